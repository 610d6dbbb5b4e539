"""Collective error handling: runs a step on all ranks or on rank 0, and raises its error on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_lite.backend.environment import host_name
from megatron_lite.backend.group import Group
from megatron_lite.errors import CheckpointError, FailedRank, MegatronLiteError
from megatron_lite.runs.manifest import CorruptCheckpointError

T = TypeVar("T")


def run_on_all_ranks(world: Group, step: Callable[[], T]) -> T:
    """Runs `step` on every rank, waits for all, and returns this rank's result; a collective call.

    Raises:
        CheckpointError: `step` failed on some rank; the first one's words, with its host and rank (failed_rank).
        Exception: the rank where `step` failed with another kind of error raises that one.
    """
    try:
        result = step()
    except Exception as error:
        failures = world.all_gather_object(_describe(error))
        if world.size == 1 or not isinstance(error, CheckpointError):
            raise
        first, place = _first(failures)
        place.__cause__ = error
        raise first from place
    failures = world.all_gather_object(None)
    if any(failures):
        first, place = _first(failures)
        raise first from place
    return result


def broadcast_from_rank0(world: Group, step: Callable[[], T]) -> T:
    """Runs `step` on rank 0 alone and returns its result on every rank; a collective call.

    Raises:
        CheckpointError: `step` failed, as `run_on_all_ranks` tells it.
    """
    result = run_on_all_ranks(world, lambda: step() if world.rank == 0 else None)
    told: T = world.all_gather_object(result)[0]
    return told


def _first(
    failures: Sequence[tuple[type[CheckpointError], str, str, str, str] | None],
) -> tuple[CheckpointError, FailedRank]:
    """The error of the first rank that failed, as every rank raises it, and its cause."""
    rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    kind, problem, rule, fix, host = failure
    return kind(f"On {host}, rank {rank}: {problem}", rule=rule, fix=fix), FailedRank(host, rank)


def _describe(error: Exception) -> tuple[type[CheckpointError], str, str, str, str]:
    host = host_name()
    kind = CorruptCheckpointError if isinstance(error, CorruptCheckpointError) else CheckpointError
    if isinstance(error, MegatronLiteError):
        return kind, error.problem, error.rule, error.fix, host
    return kind, f"{type(error).__name__}: {error}", "", "See that rank's own error above", host
