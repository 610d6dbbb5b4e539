"""Save schedule: the iterations at which checkpoints are written."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.checkpoint import CheckpointConfig, SavePhase


def falls_on(phases: Sequence[SavePhase], iteration: int) -> bool:
    """Whether a schedule of phases names `iteration`.

    Within a phase these are the multiples of its interval, counted from the start of the run, so a resumed run saves
    where an uninterrupted one does.
    """
    for phase in phases:
        if not phase.until or iteration <= phase.until:
            return iteration > 0 and phase.interval > 0 and iteration % phase.interval == 0
    return False


def is_save_iteration(checkpoint: CheckpointConfig, iteration: int) -> bool:
    """Whether a checkpoint is due once `iteration` iterations are finished."""
    return falls_on(checkpoint.phases, iteration)


def is_weights_iteration(checkpoint: CheckpointConfig, iteration: int) -> bool:
    """Whether the weights alone are to be saved once `iteration` iterations are finished (--weights-only-every)."""
    every = checkpoint.weights_only_every
    return iteration > 0 and every > 0 and iteration % every == 0


def save_iterations(checkpoint: CheckpointConfig, last_iteration: int) -> list[range]:
    """Iterations up to `last_iteration` after which a checkpoint is due, ascending: one range for each phase with any.

    Ranges, because a run of a billion iterations may save after each.
    """
    done, found = 0, list[range]()
    for phase in checkpoint.phases:
        until = min(phase.until or last_iteration, last_iteration)
        if phase.interval > 0:
            found.append(range((done // phase.interval + 1) * phase.interval, until + 1, phase.interval))
        done = max(done, until)
    return [iterations for iterations in found if iterations]
