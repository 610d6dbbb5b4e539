"""Flag entries: batch size, run length, evaluation, loss spikes and exit conditions."""

from __future__ import annotations

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.structured import (
    read_iterations,
    read_rampup,
    read_ranges,
    read_sequence_ramp,
    write_rampup,
    write_ranges,
    write_sequence_ramp,
)

BATCH = (
    Flag("--seq-length", "batch.seq_length", "Tokens of a sample.", aliases=("--encoder-seq-length",), most=10**9),
    Flag(
        "--micro-batch-size",
        "batch.micro_batch_size",
        "Samples that a replica computes at once.",
        aliases=("--batch-size",),
        most=10**6,
    ),
    Flag(
        "--global-batch-size",
        "batch.global_batch_size",
        "Samples of an iteration (micro-batch x data-parallel size if not given). The micro-batch must divide it; "
        "the data-parallel size need not.",
    ),
    Flag(
        "--gas",
        "command.accumulation_steps",
        "Gradient accumulation steps, as Megatron 1.1 with DeepSpeed: the global batch is micro-batch x steps x "
        "data-parallel size.",
        aliases=("--gradient-accumulation-steps",),
    ),
    Flag(
        "--rampup-batch-size",
        "batch.rampup",
        "Start batch, increment and samples of a batch ramp-up.",
        words="three",
        read=read_rampup,
        write=write_rampup,
        metavar="START INCREMENT SAMPLES",
        example="16 16 5_000_000",
    ),
    Flag(
        "--step-batch-size-schedule",
        "command.step_batch_size_schedule",
        'Global batch by consumed tokens, as "0:16 2.4B:320 4.8B:624".',
        words="some",
        read=" ".join,
        metavar="TOKENS:BATCH …",
        example="0:16 2.4B:320 4.8B:624",
    ),
    Flag(
        "--decrease-batch-size-if-needed",
        "batch.decrease_if_needed",
        "Round the batch down to a multiple of micro-batch x data-parallel size.",
        sets=True,
    ),
    Flag(
        "--seq-length-warmup",
        "batch.sequence_ramp",
        "Curriculum by sequence length: START:ITERATIONS[:STEP], or stages as 1:64,1000:512.",
        words="some",
        read=read_sequence_ramp,
        write=write_sequence_ramp,
        metavar="START:ITERATIONS[:STEP]",
        example="64:36000:8",
    ),
)

TRAINING = (
    Flag("--train-iters", "training.train_iters", "Iterations of the run, over all its jobs."),
    Flag("--train-samples", "training.train_samples", "Samples of the run, instead of iterations."),
    Flag("--train-tokens", "training.train_tokens", "Stop at this many tokens, if that comes first (0: no limit)."),
    Flag(
        "--calculate-per-token-loss",
        "command.per_token_loss",
        "Average over tokens instead of samples: the same, unless --eod-mask-loss makes samples uneven (refused then).",
        sets=True,
    ),
    Flag("--skip-train", "training.skip_train", "Evaluate only.", sets=True, aliases=("--eval-only",)),
    Flag(
        "--eval-interval",
        "training.eval_interval",
        "Iterations between validations (0: only one, at the end).",
    ),
    Flag("--eval-iters", "training.eval_iters", "Global batches of one validation (0: no validation)."),
    Flag(
        "--skip-train-iteration-range",
        "training.skip_iteration_ranges",
        "Inclusive ranges of iterations whose samples are consumed but not trained on.",
        words="some",
        read=read_ranges,
        write=write_ranges,
        metavar="FIRST-LAST …",
        example="101-200 251-300",
    ),
    Flag(
        "--iterations-to-skip",
        "training.skip_iteration_ranges",
        "The same, as a list of iterations.",
        words="some",
        read=read_iterations,
        metavar="ITERATION …",
        example="101 102 251",
        means="--skip-train-iteration-range",
    ),
)

SPIKES = (
    Flag(
        "--spike-factor",
        "training.spike_factor",
        "A loss of more than X times the median of recent losses is too high (0: spikes are not looked for).",
    ),
    Flag(
        "--spike-patience",
        "training.spike_patience",
        "Iterations in a row with too high a loss that make a spike, whose checkpoints are kept.",
    ),
    Flag(
        "--auto-rollback",
        "training.auto_rollback",
        "How often the run may go back before a spike by itself, leaving out its samples (0: never).",
    ),
)

WEIGHT_CHECKS = (
    Flag(
        "--check-weight-hash-across-dp-replicas-interval",
        "training.weight_check_interval",
        "Iterations between bit-for-bit comparisons of the weights that several ranks hold: data-parallel replicas, "
        "parameters that tensor-parallel ranks share, tied embeddings (0: none).",
    ),
    Flag(
        "--on-weight-mismatch",
        "training.on_weight_mismatch",
        "When replicas of a weight differ: stop with an error, or repair them and their optimizer state and go on.",
    ),
)

STOPPING = (
    Flag(
        "--exit-interval",
        "training.exit_interval",
        "Exit after an iteration that this divides, counted from the start of the run (0: never).",
    ),
    Flag("--exit-after-iters", "training.exit_after_iters", "Exit after this many iterations of this job (0: never)."),
    Flag("--exit-samples", "training.exit_samples", "Exit once this many samples were consumed in total (0: never)."),
    Flag(
        "--exit-duration-in-mins",
        "training.exit_duration_minutes",
        "Save and exit once the job has run this many minutes (0: never).",
    ),
    Flag("--kill-switch-path", "training.kill_switch_path", "Save and exit once this file exists."),
    Flag("--exit-signal-handler", "training.exit_signals", "Save and exit on SIGTERM, SIGINT and SIGUSR1.", sets=True),
    Flag("--no-exit-signal-handler", "training.exit_signals", "Die of signals at once.", sets=False),
)
