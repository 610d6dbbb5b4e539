"""Validation rules for saving and loading."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checkpoint import SavePhase
from megatron_lite.config.checks.bounds import at_least
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def saving_has_an_interval(config: RunConfig) -> Iterator[ConfigError]:
    """--save says where, --save-interval or --save-schedule when."""
    if config.checkpoint.save and not config.checkpoint.phases:
        yield ConfigError(
            "A run that saves needs an interval",
            found=f"--save {config.checkpoint.save}",
            fix="Give --save-interval N, or --save-schedule as 10:100 18:1000 1500",
        )


def phases_rise(config: RunConfig) -> Iterator[ConfigError]:
    """Ranges of --save-schedule and --keep-phase end one after the other, and their intervals are positive."""
    yield from _phases_rise("--save-schedule", config.checkpoint.phases)
    yield from _phases_rise("--keep-phase", config.checkpoint.keep_phases)


def _phases_rise(flag: str, phases: tuple[SavePhase, ...]) -> Iterator[ConfigError]:
    previous = 0
    for phase in phases:
        last = phase is phases[-1] and not phase.until
        if phase.interval < 1 or (phase.until <= previous and not last):
            yield ConfigError(
                f"The ranges of {flag} have a positive interval and end one after the other",
                found=f"{phase.interval}:{phase.until}" + (f" after {previous}" if previous else ""),
                fix=f"Give {flag} as 10:100 18:1000 1500: every 10 to iteration 100, every 18 to 1000, then every 1500",
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
    yield from at_least(0, load_iteration=checkpoint.load_iteration)
    if checkpoint.load:
        return
    for flag, given in (
        ("--load-iteration", checkpoint.load_iteration),
        ("--exit-on-missing-checkpoint", checkpoint.exit_on_missing),
        ("--use-checkpoint-opt_param-scheduler", checkpoint.use_checkpoint_schedule),
    ):
        if given:
            yield ConfigError(f"{flag} needs a checkpoint", found=f"{flag} without --load", fix="Give --load FOLDER")


def retention_has_something_to_delete(config: RunConfig) -> Iterator[ConfigError]:
    """--keep-every and --keep-phase say which old checkpoints outlive --keep-last."""
    checkpoint = config.checkpoint
    yield from at_least(
        0,
        keep_last=checkpoint.keep_last,
        keep_every=checkpoint.keep_every,
        weights_only_every=checkpoint.weights_only_every,
    )
    if (checkpoint.keep_every or checkpoint.keep_phases) and not checkpoint.keep_last:
        yield ConfigError(
            "--keep-every and --keep-phase say which checkpoints --keep-last leaves",
            found="no --keep-last, so that every checkpoint is kept",
            fix="Add --keep-last with the number of newest checkpoints to keep besides, such as 2",
        )
    if checkpoint.weights_only_every and not checkpoint.save:
        yield ConfigError(
            "Weights are saved below --save",
            found=f"--weights-only-every {checkpoint.weights_only_every} without --save",
            fix="Give --save FOLDER, with --save-interval N",
        )


def spikes_are_looked_for(config: RunConfig) -> Iterator[ConfigError]:
    """A run that goes back before a spike must look for spikes, and have checkpoints to go back to."""
    training = config.training
    yield from at_least(0, spike_factor=training.spike_factor, auto_rollback=training.auto_rollback)
    yield from at_least(1, spike_patience=training.spike_patience)
    if 0 < training.spike_factor <= 1:
        yield ConfigError(
            "A spike is a loss above the usual one",
            found=f"--spike-factor {training.spike_factor:g}",
            fix="Give a factor above 1, such as 1.5",
        )
    if training.auto_rollback and not (training.spike_factor and config.checkpoint.save):
        yield ConfigError(
            "--auto-rollback goes back to a checkpoint from before a spike",
            found=f"--auto-rollback {training.auto_rollback} without --spike-factor or without --save",
            fix="Give --spike-factor and --save, or leave --auto-rollback out",
        )


RULES = (
    saving_has_an_interval,
    phases_rise,
    one_schedule_wins,
    loading_needs_a_folder,
    retention_has_something_to_delete,
    spikes_are_looked_for,
)
