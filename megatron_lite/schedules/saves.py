"""Save schedule: the iterations at which checkpoints are written."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.checkpoint import CheckpointConfig, SavePhase

SAVE_SAFETY = 1.5
"""Time left for a save before the end of a job, as a multiple of the slowest measured one."""
FIRST_SAVE_SECONDS, FIRST_SAVE_RATE = 10.0, 200e6
"""Assumed duration of the run's first save: seconds, plus its size at a slow file system's bytes per second."""


def save_budget(slowest: float, checkpoint_size: int) -> float:
    """Return the seconds to leave for a save before the end of a job.

    Args:
        slowest: seconds of the slowest measured save; 0: none was measured.
        checkpoint_size: bytes of a checkpoint.
    """
    return SAVE_SAFETY * slowest if slowest else FIRST_SAVE_SECONDS + checkpoint_size / FIRST_SAVE_RATE


def falls_on(phases: Sequence[SavePhase], iteration: int) -> bool:
    """Return whether `iteration` is due in a schedule of phases.

    Within a phase, the multiples of its interval are due. They are counted from the start of the run, so a resumed run
    saves at the same iterations as an uninterrupted one.
    """
    for phase in phases:
        if not phase.until or iteration <= phase.until:
            return iteration > 0 and phase.interval > 0 and iteration % phase.interval == 0
    return False


def is_save_iteration(checkpoint: CheckpointConfig, iteration: int) -> bool:
    """Return whether a checkpoint is due after `iteration` iterations."""
    return falls_on(checkpoint.phases, iteration)


def is_weights_iteration(checkpoint: CheckpointConfig, iteration: int) -> bool:
    """Return whether a weights-only checkpoint is due after `iteration` iterations (--weights-only-every)."""
    every = checkpoint.weights_only_every
    return iteration > 0 and every > 0 and iteration % every == 0


def save_iterations(checkpoint: CheckpointConfig, last_iteration: int) -> list[range]:
    """Return the iterations up to `last_iteration` after which a checkpoint is due, as one ascending range per phase.

    A list would be too long for a run of a billion iterations that saves after each.
    """
    done, found = 0, list[range]()
    for phase in checkpoint.phases:
        until = min(phase.until or last_iteration, last_iteration)
        if phase.interval > 0:
            found.append(range((done // phase.interval + 1) * phase.interval, until + 1, phase.interval))
        done = max(done, until)
    return [iterations for iterations in found if iterations]
