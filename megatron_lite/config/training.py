"""Training config: run length, evaluation, skipped iterations, exit conditions, loss spikes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import Flag, Format, option
from megatron_lite.config.values import read_int
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


def read_ranges(args: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Read "2-5 10-20" as inclusive ranges of iterations, sorted; a single number is a range of one."""
    ranges = []
    for arg in " ".join(args).replace(",", " ").split():
        first, dash, last = arg.partition("-")
        try:
            ranges.append((read_int(first), read_int(last) if dash else read_int(first)))
        except ValueError:
            raise ValueError("ranges of iterations, for example 101-200 251-300") from None
    return tuple(sorted(ranges))


def read_iterations(args: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Read "2 3 4" as inclusive ranges of iterations."""
    ranges: list[tuple[int, int]] = []
    try:
        numbers = sorted({read_int(arg) for arg in " ".join(args).replace(",", " ").split()})
    except ValueError:
        raise ValueError("iterations, for example 101 102 251") from None
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return tuple(ranges)


def write_ranges(ranges: tuple[tuple[int, int], ...]) -> list[str]:
    """Return the arguments of --skip-train-iteration-range."""
    return [f"{first}-{last}" for first, last in ranges]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, evaluation and early exits. One of train_iters, train_samples and TuningConfig.epochs is not 0."""

    train_iters: int = option(0, Flag("--train-iters", "Iterations of the run, over all its jobs."))
    train_samples: int = option(0, Flag("--train-samples", "Samples of the run, instead of iterations."))
    train_tokens: int = option(
        0, Flag("--train-tokens", "Stop at this many tokens, if that comes first (0: no limit).")
    )
    per_token_loss: bool = option(
        False,
        Flag(
            "--calculate-per-token-loss",
            "Mean loss over all unmasked tokens of the global batch, not the mean over samples of their means.",
            sets=True,
        ),
    )
    skip_train: bool = option(False, Flag("--skip-train", "Evaluate only.", sets=True, aliases=("--eval-only",)))
    eval_interval: int = option(
        1000, Flag("--eval-interval", "Iterations between validations (0: only one, at the end).")
    )
    eval_iters: int = option(100, Flag("--eval-iters", "Global batches of one validation (0: no validation)."))
    skip_iteration_ranges: tuple[tuple[int, int], ...] = option(
        (),
        Flag(
            "--skip-train-iteration-range",
            "Inclusive ranges of iterations whose samples are consumed but not trained on.",
            format=Format(metavar="FIRST-LAST …", example="101-200 251-300", read=read_ranges, write=write_ranges),
        ),
        Flag(
            "--iterations-to-skip",
            "The same, as a list of iterations.",
            format=Format(metavar="ITERATION …", example="101 102 251", read=read_iterations),
            means="--skip-train-iteration-range",
        ),
    )

    spike_factor: float = option(
        0.0,
        Flag(
            "--spike-factor",
            "A loss of more than X times the median of recent losses is too high (0: no detection of spikes).",
        ),
    )
    spike_patience: int = option(
        3,
        Flag(
            "--spike-patience",
            "Iterations in a row with too high a loss that make a loss spike, whose checkpoints are kept.",
            least=1,
        ),
    )
    auto_rollback: int = option(
        0,
        Flag(
            "--auto-rollback",
            "Largest number of automatic rollbacks to before a loss spike, each skipping the spike's samples "
            "(0: none).",
        ),
    )

    weight_check_interval: int = option(
        0,
        Flag(
            "--check-weight-hash-across-dp-replicas-interval",
            "Iterations between bit-for-bit comparisons of the weights that several ranks hold: data-parallel "
            "replicas, parameters that tensor-parallel ranks share, tied embeddings (0: none).",
        ),
    )
    on_weight_mismatch: Literal["stop", "repair"] = option(
        "stop",
        Flag(
            "--on-weight-mismatch",
            "When replicas of a weight differ: stop with an error, or overwrite them and their optimizer state "
            "with one replica's and continue.",
        ),
    )

    exit_interval: int = option(
        0,
        Flag(
            "--exit-interval",
            "Exit after an iteration whose number, counted from the start of the run, this divides (0: never).",
        ),
    )
    exit_after_iters: int = option(
        0, Flag("--exit-after-iters", "Exit after this many iterations of this job (0: never).")
    )
    exit_samples: int = option(
        0, Flag("--exit-samples", "Exit once this many samples were consumed in total (0: never).")
    )
    exit_duration_minutes: float = option(
        0.0, Flag("--exit-duration-in-mins", "Save and exit once the job has run this many minutes (0: never).")
    )
    exit_before_job_end: bool = option(
        True,
        Flag(
            "--exit-before-job-end",
            "In a Slurm job: save and exit in time for the save to end before the job's time limit.",
            sets=True,
        ),
        Flag("--no-exit-before-job-end", "Ignore the time limit of the Slurm job.", sets=False),
    )
    job_end_margin: float = option(
        30.0,
        Flag(
            "--job-end-margin-in-secs",
            "Seconds between the estimated end of the last save and the time limit of the Slurm job.",
        ),
    )
    kill_switch_path: str = option("", Flag("--kill-switch-path", "Save and exit once this file exists."))
    exit_signals: bool = option(
        True,
        Flag(
            "--exit-signal-handler", "After SIGTERM, SIGINT or SIGUSR1: finish the iteration, save and exit.", sets=True
        ),
        Flag("--no-exit-signal-handler", "Die of signals at once.", sets=False),
    )


def one_length(config: RunConfig) -> Iterator[ConfigError]:
    """Require a length in iterations, samples or epochs, unless the run only evaluates."""
    training = config.training
    lengths = {
        "--train-iters": training.train_iters,
        "--train-samples": training.train_samples,
        "--epochs": config.tuning.epochs,
    }
    given = [f"{flag} {number}" for flag, number in lengths.items() if number]
    if len(given) > 1:
        yield ConfigError(
            f"The run has {'two' if len(given) == 2 else 'three'} lengths: {' and '.join(given)}",
            fix="Keep one of these flags",
        )
    if not given and not training.skip_train:
        yield ConfigError(
            "The length of the run is 0 or not given (--train-iters, --train-samples, --epochs)",
            fix="Give --train-iters N, --train-samples N or --epochs N above 0, or --skip-train to evaluate only",
        )


def repairs_need_checks(config: RunConfig) -> Iterator[ConfigError]:
    """Require weight comparisons for weight repairs."""
    training = config.training
    if training.on_weight_mismatch == "repair" and not training.weight_check_interval:
        yield ConfigError(
            "--on-weight-mismatch repair has no effect without --check-weight-hash-across-dp-replicas-interval",
            fix="Add --check-weight-hash-across-dp-replicas-interval N (for example 100), or remove "
            "--on-weight-mismatch",
        )


def skipped_ranges_are_apart(config: RunConfig) -> Iterator[ConfigError]:
    """Require skipped ranges of iterations that rise and do not overlap."""
    previous = 0
    for first, last in sorted(config.training.skip_iteration_ranges):
        if first < 1 or last < first or first <= previous:
            fault = f"overlaps the range that ends at {previous}" if first > 0 else "starts below iteration 1"
            yield ConfigError(
                f"--skip-train-iteration-range {first}-{last} {fault if first <= last else 'ends before it starts'}",
                fix="Give ranges FIRST-LAST from iteration 1 on that do not overlap, for example 101-200 251-300",
            )
        previous = max(previous, last)


def rollback_needs_spikes_and_saves(config: RunConfig) -> Iterator[ConfigError]:
    """Require spike detection and checkpoints for automatic rollback."""
    training = config.training
    if 0 < training.spike_factor <= 1:
        yield ConfigError(
            f"--spike-factor {training.spike_factor:g} would count usual losses as spikes",
            rule="A loss above this factor times the median of recent losses counts as a spike",
            fix="Use a factor above 1, such as --spike-factor 1.5",
        )
    needed = {"--spike-factor 1.5": training.spike_factor, "--save FOLDER": config.checkpoint.save}
    missing = [flag for flag, value in needed.items() if not value]
    if training.auto_rollback and missing:
        yield ConfigError(
            f"--auto-rollback {training.auto_rollback} is given without "
            f"{' and '.join(flag.split()[0] for flag in missing)}",
            rule="Automatic rollback loads a checkpoint from before a detected loss spike",
            fix=f"Add {' and '.join(missing)}, or remove --auto-rollback",
        )


RULES = (one_length, repairs_need_checks, skipped_ranges_are_apart, rollback_needs_spikes_and_saves)
