"""Checkpoint config: save folder and schedule, retention, --load options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import FIELD, Flag, Format, option
from megatron_lite.config.values import read_int
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

CHANGEABLE = ("tokenizer", "data", "code")


@dataclass(frozen=True, kw_only=True)
class SavePhase:
    """Save every `interval` iterations up to iteration `until` (0: to the end of the run)."""

    interval: int
    until: int = 0


def read_save_schedule(args: Sequence[str]) -> tuple[SavePhase, ...]:
    """Read "10:100 18:1000 1500": every 10 to iteration 100, every 18 to 1000, then every 1500.

    Raises:
        ValueError: not in that form.
    """
    expected = "<interval>:<last iteration> pairs and at most one closing <interval>, for example 10:100 18:1000 1500"
    phases: list[SavePhase] = []
    for entry in re.split(r"[\s,]+", " ".join(args).strip()):
        interval, colon, until = entry.partition(":")
        if phases and not phases[-1].until:
            raise ValueError(expected)
        try:
            phases.append(SavePhase(interval=read_int(interval), until=read_int(until) if colon else 0))
        except ValueError:
            raise ValueError(expected) from None
    return tuple(phases)


def write_save_schedule(phases: tuple[SavePhase, ...]) -> list[str]:
    """Return the argument of --save-schedule."""
    return [" ".join(f"{phase.interval}:{phase.until}" if phase.until else str(phase.interval) for phase in phases)]


def _read_changed(args: Sequence[str]) -> tuple[str, ...]:
    if not set(args) <= set(CHANGEABLE):
        raise ValueError(f"some of {', '.join(CHANGEABLE)}")
    return tuple(sorted(set(args), key=CHANGEABLE.index))


SAVE_SCHEDULE = Format(
    metavar="INTERVAL:LAST …", example="10:100 18:1000 1500", read=read_save_schedule, write=write_save_schedule
)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, retention and loading."""

    save: str = option("", Flag("--save", "Folder of the checkpoints.", metavar="FOLDER"))
    phases: tuple[SavePhase, ...] = option(
        (),
        Flag(
            "--save-schedule",
            'Intervals by range: "10:100 18:1000 1500" is every 10 to iteration 100, every 18 to 1000, then every '
            "1500.",
            format=SAVE_SCHEDULE,
        ),
    )
    save_optimizer: bool = option(True, Flag("--no-save-optim", "Save no optimizer state.", sets=False))
    asynchronous: bool = option(False, Flag("--async-save", "Write checkpoints during training.", sets=True))
    save_on_exit: bool = option(
        True,
        Flag("--save-on-exit", "Save before every early stop.", sets=True),
        Flag("--no-save-on-exit", "Stop early without saving; the end of a run is always saved.", sets=False),
    )
    save_best: bool = option(
        False,
        Flag(
            "--save-best",
            "Save after each validation with the lowest loss so far; that checkpoint is kept, and --load FOLDER/best "
            "loads it.",
            sets=True,
        ),
    )
    on_failed_save: Literal["stop", "continue"] = option(
        "stop",
        Flag(
            "--on-failed-save",
            "After a failed save (a full disk): stop, or continue training. A failed last save of a job is always "
            "an error.",
        ),
    )
    weights_only_every: int = option(
        0,
        Flag(
            "--weights-only-every",
            "Iterations between saves of the weights alone, kept in the folder weights below --save (0: none).",
        ),
    )
    keep_last: int = option(
        0, Flag("--keep-last", "Checkpoints kept (0: all).", aliases=("--keep-last-n-checkpoints",))
    )
    keep_every: int = option(
        0, Flag("--keep-every", "Besides the last, keep the checkpoints of every N iterations (0: none).")
    )
    keep_phases: tuple[SavePhase, ...] = option(
        (),
        Flag(
            "--keep-phase",
            'Besides the last, keep by range: "10:100 90:1000 1500" is every 10 to iteration 100, every 90 to '
            "1000, then every 1500.",
            format=SAVE_SCHEDULE,
        ),
    )
    load: str = option("", Flag("--load", "Folder of checkpoints to resume from.", metavar="FOLDER"))
    load_iteration: int = option(
        0,
        Flag(
            "--load-iteration",
            "Iteration to load (0: the one in latest_checkpointed_iteration.txt).",
            aliases=("--ckpt-step",),
        ),
    )
    load_optimizer: bool = option(True, Flag("--no-load-optim", "Load no optimizer state.", sets=False))
    finetune: bool = option(False, Flag("--finetune", "Load the weights only and start at iteration 0.", sets=True))
    reset_progress: bool = option(
        False,
        Flag(
            "--reset-iteration",
            "Load weights and optimizer state, and start at iteration 0 with no samples consumed.",
            sets=True,
            aliases=("--reset-progress",),
        ),
    )
    exit_on_missing: bool = option(
        False,
        Flag(
            "--exit-on-missing-checkpoint",
            "Fail if --load holds no checkpoint, instead of starting from fresh weights.",
            sets=True,
        ),
    )
    fallback_on_corrupt: bool = option(
        False,
        Flag("--fallback-on-corrupt", "Load the newest earlier checkpoint if the requested one is damaged.", sets=True),
    )
    accept_changed: tuple[str, ...] = option(
        (),
        Flag(
            "--accept-changed",
            "What may differ from the run that wrote the checkpoint: tokenizer, data. (`code` is accepted and has no "
            "effect: changed code is a warning.)",
            format=Format(metavar="WHAT …", example="data code", read=_read_changed, write=list),
        ),
    )
    override_schedule: bool = option(
        False,
        Flag(
            "--override-opt-param-scheduler",
            "Use the command line's learning-rate schedule, not the checkpoint's.",
            sets=True,
            aliases=("--override-lr-scheduler",),
        ),
    )
    use_checkpoint_schedule: bool = option(
        False,
        Flag(
            "--use-checkpoint-opt-param-scheduler",
            "Use the checkpoint's learning-rate schedule, not the command line's.",
            sets=True,
            aliases=("--use-checkpoint-lr-scheduler",),
        ),
    )

    @property
    def in_one_folder(self) -> bool:
        """True if --load and --save are the same folder: one command both starts and resumes such a run."""
        return bool(self.load and self.save) and Path(self.load).resolve() == Path(self.save).resolve()


def resolve_save_interval(given: Given) -> None:
    """Append --save-interval to the phases of --save-schedule."""
    origin, interval = given.origin(FIELD.command.save_interval), given.run.command.save_interval
    if not origin:
        return
    phases = given.run.checkpoint.phases
    if phases and not phases[-1].until and phases[-1].interval != interval:
        given.refuse(
            f"{origin} and {given.origin(FIELD.checkpoint.phases)} both give an interval for the end of the run",
            fix=f"Remove --save-interval, or write the last part of --save-schedule with a last iteration, for example "
            f"{phases[-1].interval}:10000",
        )
    elif not phases or phases[-1].until:
        given.give(FIELD.checkpoint.phases, (*phases, SavePhase(interval=interval)), origin)


RESOLVERS = (resolve_save_interval,)


def saving_has_an_interval(config: RunConfig) -> Iterator[ConfigError]:
    """Require --save-interval or --save-schedule with --save."""
    if config.checkpoint.save and not config.checkpoint.phases:
        yield ConfigError(
            f"--save {config.checkpoint.save} is given, but not how often to save",
            fix="Add --save-interval 1000 (every 1,000 iterations), or --save-schedule 10:100 18:1000 1500 (every 10 "
            "iterations to iteration 100, every 18 to 1000, then every 1500)",
        )


def phases_rise(config: RunConfig) -> Iterator[ConfigError]:
    """Require rising ends and positive intervals in --save-schedule and --keep-phase."""
    yield from _phases_rise("--save-schedule", config.checkpoint.phases)
    yield from _phases_rise("--keep-phase", config.checkpoint.keep_phases)


def _phases_rise(flag: str, phases: tuple[SavePhase, ...]) -> Iterator[ConfigError]:
    previous = 0
    for phase in phases:
        last = phase is phases[-1] and not phase.until
        if phase.interval < 1 or (phase.until <= previous and not last):
            written = f"{phase.interval}:{phase.until}" if phase.until else f"{phase.interval}"
            fault = "has an interval below 1"
            if phase.interval > 0:
                after = f"iteration {previous}, the end of the range before it" if previous else "iteration 0"
                fault = f"ends at iteration {phase.until}, not after {after}"
            yield ConfigError(
                f"{flag}: the range {written} {fault}",
                rule="Each range is INTERVAL:LAST-ITERATION; the last range may be INTERVAL alone",
                fix=f"Write, for example, {flag} 10:100 18:1000 1500: every 10 iterations to iteration 100, every 18 "
                "to "
                "1000, then every 1500",
            )
        previous = max(previous, phase.until)


def one_lr_schedule(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse both the command line's and the checkpoint's learning-rate schedule."""
    checkpoint = config.checkpoint
    if checkpoint.override_schedule and checkpoint.use_checkpoint_schedule:
        yield ConfigError(
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict each other",
            fix="Remove the first to use the checkpoint's learning-rate schedule, or the second to use the command "
            "line's",
        )


def loading_needs_a_folder(config: RunConfig) -> Iterator[ConfigError]:
    """Require --load with flags about loading."""
    checkpoint = config.checkpoint
    if checkpoint.load:
        return
    for flag, given in (
        ("--load-iteration", checkpoint.load_iteration),
        ("--exit-on-missing-checkpoint", checkpoint.exit_on_missing),
        ("--use-checkpoint-opt-param-scheduler", checkpoint.use_checkpoint_schedule),
    ):
        if given:
            yield ConfigError(f"{flag} has no effect without --load", fix=f"Add --load FOLDER, or remove {flag}")


def retention_has_something_to_delete(config: RunConfig) -> Iterator[ConfigError]:
    """Require --keep-last with its exceptions, and --save with --weights-only-every and --save-best."""
    checkpoint = config.checkpoint
    if (checkpoint.keep_every or checkpoint.keep_phases) and not checkpoint.keep_last:
        yield ConfigError(
            f"{'--keep-every' if checkpoint.keep_every else '--keep-phase'} has no effect without --keep-last: without "
            "it every checkpoint is kept",
            fix=f"Remove {'--keep-every' if checkpoint.keep_every else '--keep-phase'} to keep all, or add --keep-last "
            "N, with which all others than these and the N newest are deleted",
        )
    every = checkpoint.weights_only_every
    for flag, given in ((f"--weights-only-every {every}", every), ("--save-best", checkpoint.save_best)):
        if given and not checkpoint.save:
            yield ConfigError(
                f"{flag} has no effect without --save",
                fix=f"Add --save FOLDER and --save-interval N, or remove {flag.split()[0]}",
            )


RULES = (
    saving_has_an_interval,
    phases_rise,
    one_lr_schedule,
    loading_needs_a_folder,
    retention_has_something_to_delete,
)
