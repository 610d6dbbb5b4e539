"""At which iterations a checkpoint is written."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checkpoint import CheckpointConfig


def is_save_iteration(checkpoint: CheckpointConfig, iteration: int) -> bool:
    """Whether a checkpoint is due once `iteration` iterations are finished.

    Within a phase these are the multiples of its interval, counted from the start of the run, so a resumed run saves
    where an uninterrupted one does.
    """
    for phase in checkpoint.phases:
        if not phase.until or iteration <= phase.until:
            return iteration > 0 and phase.interval > 0 and iteration % phase.interval == 0
    return False


def save_iterations(checkpoint: CheckpointConfig, last_iteration: int) -> Iterator[int]:
    """Yield every iteration up to `last_iteration` after which a checkpoint is due, ascending."""
    done = 0
    for phase in checkpoint.phases:
        until = min(phase.until or last_iteration, last_iteration)
        if phase.interval > 0:
            yield from range((done // phase.interval + 1) * phase.interval, until + 1, phase.interval)
        done = max(done, until)
