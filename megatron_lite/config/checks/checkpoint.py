"""Rules of saving and loading."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checks.bounds import at_least
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def saving_has_an_interval(config: RunConfig) -> Iterator[ConfigError]:
    """--save says where, --save-interval or --save-schedule when."""
    if config.checkpoint.save and not config.checkpoint.phases:
        yield ConfigError(
            "A run that saves needs an interval",
            found=f"--save {config.checkpoint.save}",
            fix="Give --save-interval or --save-schedule",
        )


def phases_rise(config: RunConfig) -> Iterator[ConfigError]:
    """Ranges of --save-schedule end one after the other, and their intervals are positive."""
    phases, previous = config.checkpoint.phases, 0
    for phase in phases:
        last = phase is phases[-1] and not phase.until
        if phase.interval < 1 or (phase.until <= previous and not last):
            yield ConfigError(
                "The ranges of a save schedule have a positive interval and end one after the other",
                found=f"{phase.interval}:{phase.until}" + (f" after {previous}" if previous else ""),
                fix="Correct --save-schedule",
            )
        previous = max(previous, phase.until)


def one_schedule_wins(config: RunConfig) -> Iterator[ConfigError]:
    """The learning rate's schedule comes from the command line or from the checkpoint."""
    checkpoint = config.checkpoint
    if checkpoint.override_schedule and checkpoint.use_checkpoint_schedule:
        yield ConfigError(
            "One learning-rate schedule wins",
            found="--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler",
            fix="Leave one of them out",
        )


def loading_needs_a_folder(config: RunConfig) -> Iterator[ConfigError]:
    """Flags that say what to load need --load."""
    checkpoint = config.checkpoint
    yield from at_least(0, load_iteration=checkpoint.load_iteration, keep_last=checkpoint.keep_last)
    if checkpoint.load:
        return
    for flag, given in (
        ("--load-iteration", checkpoint.load_iteration),
        ("--exit-on-missing-checkpoint", checkpoint.exit_on_missing),
        ("--use-checkpoint-opt_param-scheduler", checkpoint.use_checkpoint_schedule),
    ):
        if given:
            yield ConfigError(f"{flag} needs a checkpoint", found=f"{flag} without --load", fix="Give --load")


RULES = (saving_has_an_interval, phases_rise, one_schedule_wins, loading_needs_a_folder)
