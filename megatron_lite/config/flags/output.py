"""Flag entries: checkpoints, logging and runtime."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.structured import read_save_schedule, write_save_schedule
from megatron_lite.config.values import MAX_SEED

CHANGEABLE = ("tokenizer", "data", "code")


def _read_changed(words: Sequence[str]) -> tuple[str, ...]:
    if not set(words) <= set(CHANGEABLE):
        raise ValueError(f"some of {', '.join(CHANGEABLE)}")
    return tuple(sorted(set(words), key=CHANGEABLE.index))


CHECKPOINT = (
    Flag("--save", "checkpoint.save", "Folder of the checkpoints.", metavar="FOLDER"),
    Flag(
        "--save-interval",
        "command.save_interval",
        "Iterations between checkpoints; after the last range of --save-schedule, if both are given.",
        aliases=("--persistent-save-interval",),
    ),
    Flag(
        "--save-schedule",
        "checkpoint.phases",
        'Intervals by range: "10:100 18:1000 1500" is every 10 to iteration 100, every 18 to 1000, then every 1500.',
        words="some",
        read=lambda words: read_save_schedule(" ".join(words)),
        write=write_save_schedule,
        metavar="INTERVAL:LAST …",
        example="10:100 18:1000 1500",
    ),
    Flag("--no-save-optim", "checkpoint.save_optimizer", "Save no optimizer state.", sets=False),
    Flag("--async-save", "checkpoint.asynchronous", "Write checkpoints while training goes on.", sets=True),
    Flag("--save-on-exit", "checkpoint.save_on_exit", "Save before every early stop.", sets=True),
    Flag(
        "--no-save-on-exit",
        "checkpoint.save_on_exit",
        "Stop early without saving; the end of a run is saved all the same.",
        sets=False,
    ),
    Flag(
        "--on-failed-save",
        "checkpoint.on_failed_save",
        "What a save that fails, as on a full disk, does to training; the last save of a job is always an error.",
    ),
    Flag(
        "--weights-only-every",
        "checkpoint.weights_only_every",
        "Iterations between saves of the weights alone, kept in the folder weights below --save (0: none).",
    ),
    Flag(
        "--keep-last",
        "checkpoint.keep_last",
        "Checkpoints kept (0: all).",
        aliases=("--keep-last-n-checkpoints",),
    ),
    Flag(
        "--keep-every",
        "checkpoint.keep_every",
        "Besides the last, keep the checkpoints of every N iterations (0: none).",
    ),
    Flag(
        "--keep-phase",
        "checkpoint.keep_phases",
        'Besides the last, keep by range: "10:100 90:1000 1500" is every 10 to iteration 100, every 90 to 1000, then '
        "every 1500.",
        words="some",
        read=lambda words: read_save_schedule(" ".join(words)),
        write=write_save_schedule,
        metavar="INTERVAL:LAST …",
        example="10:100 18:1000 1500",
    ),
    Flag("--load", "checkpoint.load", "Folder of checkpoints to resume from.", metavar="FOLDER"),
    Flag(
        "--load-iteration",
        "checkpoint.load_iteration",
        "Which of them (0: the latest).",
        aliases=("--ckpt-step",),
    ),
    Flag("--no-load-optim", "checkpoint.load_optimizer", "Load no optimizer state.", sets=False),
    Flag("--finetune", "checkpoint.finetune", "Load the weights only and start at iteration 0.", sets=True),
    Flag(
        "--reset-iteration",
        "checkpoint.reset_progress",
        "Load weights and optimizer, and start at iteration 0.",
        sets=True,
        aliases=("--reset-progress",),
    ),
    Flag(
        "--exit-on-missing-checkpoint",
        "checkpoint.exit_on_missing",
        "Fail if --load holds no checkpoint, instead of starting afresh.",
        sets=True,
    ),
    Flag(
        "--fallback-on-corrupt",
        "checkpoint.fallback_on_corrupt",
        "Load the newest earlier checkpoint if the wanted one is damaged.",
        sets=True,
    ),
    Flag(
        "--accept-changed",
        "checkpoint.accept_changed",
        "What may differ from the run that wrote the checkpoint: tokenizer, data, code.",
        words="some",
        read=_read_changed,
        write=list,
        metavar="WHAT …",
        example="data code",
    ),
    Flag(
        "--override-opt-param-scheduler",
        "checkpoint.override_schedule",
        "The command line's learning-rate schedule wins over the checkpoint's.",
        sets=True,
        aliases=("--override-lr-scheduler",),
    ),
    Flag(
        "--use-checkpoint-opt-param-scheduler",
        "checkpoint.use_checkpoint_schedule",
        "The checkpoint's learning-rate schedule wins over the command line's.",
        sets=True,
        aliases=("--use-checkpoint-lr-scheduler",),
    ),
)

METRICS = (
    Flag("--log-interval", "metrics.log_interval", "Iterations between log lines."),
    Flag("--tensorboard-dir", "metrics.tensorboard_dir", "Folder of the TensorBoard files.", metavar="FOLDER"),
    Flag("--tensorboard-log-interval", "metrics.tensorboard_log_interval", "Iterations between TensorBoard points."),
    Flag(
        "--tensorboard-queue-size",
        "metrics.tensorboard_queue_size",
        "Points held before they are written.",
        least=1,
        most=10**9,
    ),
    Flag("--log-timers-to-tensorboard", "metrics.log_timers", "Timers in TensorBoard.", sets=True),
    Flag(
        "--log-validation-ppl-to-tensorboard",
        "metrics.log_validation_ppl",
        "Validation perplexity in TensorBoard.",
        sets=True,
    ),
    Flag("--log-memory-to-tensorboard", "metrics.log_memory", "Memory in TensorBoard.", sets=True),
    Flag("--log-world-size-to-tensorboard", "metrics.log_world_size", "World size in TensorBoard.", sets=True),
    Flag(
        "--no-log-learning-rate-to-tensorboard",
        "metrics.log_learning_rate",
        "No learning rate in TensorBoard.",
        sets=False,
        aliases=("--no-log-learnig-rate-to-tensorboard",),
    ),
    Flag("--no-log-loss-scale-to-tensorboard", "metrics.log_loss_scale", "No loss scale in TensorBoard.", sets=False),
    Flag("--log-params-norm", "metrics.log_params_norm", "Norm of the parameters in the log.", sets=True),
    Flag("--log-num-zeros-in-grad", "metrics.log_num_zeros", "Zeros of the gradient in the log.", sets=True),
    Flag("--timing-log-level", "metrics.timing_log_level", "How finely time is measured: 0, 1 or 2.", least=0),
    Flag("--metrics-file", "metrics.metrics_file", "Path of metrics.jsonl (in --save if not given).", metavar="FILE"),
    Flag("--no-progress-bar", "metrics.progress_bar", "Plain lines on a terminal, too.", sets=False),
)

RUNTIME = (
    Flag("--device", "runtime.device", "Which kind of device; auto takes a GPU if there is one."),
    Flag("--seed", "runtime.seed", "Seed of weights, dropout and the order of the data.", least=0, most=MAX_SEED),
    Flag("--compile", "runtime.compile", "torch.compile each stage; dropout cuts its graph.", sets=True),
    Flag("--deterministic-mode", "runtime.deterministic", "Only kernels that give the same bits twice.", sets=True),
    Flag(
        "--num-threads",
        "runtime.num_threads",
        "Threads of a rank on a CPU (0: its share of the cores); on a GPU PyTorch's own number.",
        most=4096,
    ),
    Flag("--dry-run", "runtime.dry_run", "Check and explain the command, then exit.", sets=True),
)
