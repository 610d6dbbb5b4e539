"""Checkpoint retention: selects and deletes expired checkpoints after a save."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.checkpoint import CheckpointConfig, SavePhase
from megatron_lite.runs.catalog import best_iteration, folder_name, iteration_of, list_checkpoints
from megatron_lite.runs.turnover import discard
from megatron_lite.schedules.saves import falls_on


@dataclass(frozen=True)
class Retention:
    """Retention policy: the checkpoints that a new save does not delete.

    Attributes:
        last: number of newest checkpoints to keep; 0: all.
        every: also keep those whose iteration this divides; 0: none.
        phases: also keep those on this schedule.
        spikes: also keep the last checkpoint before and the first one after each loss spike, given as the first and
            last iteration with too high a loss; last is None while the loss is high.
    """

    last: int = 0
    every: int = 0
    phases: tuple[SavePhase, ...] = ()
    spikes: tuple[tuple[int, int | None], ...] = ()


KEEP_ALL = Retention()


def retention_of(checkpoint: CheckpointConfig, spikes: tuple[tuple[int, int | None], ...] = ()) -> Retention:
    """Return the retention policy of a run's flags."""
    return Retention(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_phases, spikes)


def expired(iterations: Iterable[int], newest: int, retention: Retention) -> list[int]:
    """Return the iterations whose checkpoints expire, oldest first.

    Args:
        iterations: of all complete checkpoints.
        newest: the one that was just saved. Later ones belong to a history that was rolled back: they stay, and do not
            count as newer.
        retention: the policy.
    """
    past = sorted(iteration for iteration in iterations if iteration <= newest)
    if retention.last <= 0:
        return []
    kept = _around(past, retention.spikes)
    return [
        iteration
        for iteration in past[: -retention.last]
        if iteration not in kept
        and not (retention.every and iteration % retention.every == 0)
        and not falls_on(retention.phases, iteration)
    ]


def delete_expired(root: Path, newest: int, retention: Retention) -> list[str]:
    """Delete expired checkpoints but the best, and return the names of their folders.

    Raises:
        OSError: a folder cannot be renamed or removed.
    """
    if retention.last <= 0:
        return []
    found, best = [iteration_of(checkpoint) for checkpoint in list_checkpoints(root)], best_iteration(root)
    numbers = expired([number for number in found if number is not None], newest, retention)
    names = [folder_name(number) for number in numbers if number != best]
    for name in names:
        discard(root / name)
    return names


def _around(past: list[int], spikes: Iterable[tuple[int, int | None]]) -> set[int]:
    """Return the newest checkpoint before each spike and the oldest after it."""
    kept: set[int] = set()
    for first, last in spikes:
        kept.update([iteration for iteration in past if iteration < first][-1:])
        if last is not None:
            kept.update([iteration for iteration in past if iteration >= last][:1])
    return kept
