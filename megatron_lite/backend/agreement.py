"""Collective error handling: runs a step on all ranks or on rank 0, and raises its error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_lite.backend.environment import host_name
from megatron_lite.backend.group import Group
from megatron_lite.errors import FailedRank, MegatronLiteError, TrainingError

T = TypeVar("T")


def run_on_all_ranks(world: Group, step: Callable[[], T]) -> T:
    """Run `step` on every rank, wait for all ranks, and return this rank's result; a collective call.

    Raises:
        MegatronLiteError: `step` failed on some rank. Every rank raises the error of the first such rank, of the same
            class, with host and rank in its message and as its cause (failed_rank).
        Exception: this rank's own error, where it is not a MegatronLiteError; the other ranks raise a TrainingError.
    """
    error: Exception | None = None
    try:
        result = step()
    except Exception as caught:
        error = caught
    failures = world.all_gather_object(None if error is None else _describe(error))
    if not any(failures):
        return result
    if error is not None and (world.size == 1 or not isinstance(error, MegatronLiteError)):
        raise error
    rank, (kind, problem, rule, fix, host) = next((rank, failure) for rank, failure in enumerate(failures) if failure)
    cause = FailedRank(host, rank)
    cause.__cause__ = error
    raise kind(f"On {host}, rank {rank}: {problem}", rule=rule, fix=fix) from cause


def broadcast_from_rank0(world: Group, step: Callable[[], T]) -> T:
    """Run `step` on rank 0 alone and return its result on every rank; a collective call.

    Raises:
        MegatronLiteError: `step` failed; as run_on_all_ranks.
    """
    result = run_on_all_ranks(world, lambda: step() if world.rank == 0 else None)
    received: T = world.all_gather_object(result)[0]
    return received


def _describe(error: Exception) -> tuple[type[MegatronLiteError], str, str, str, str]:
    """Return the class, problem, rule, fix and host by which another rank raises the same error."""
    if not isinstance(error, MegatronLiteError):
        return TrainingError, f"{type(error).__name__}: {error}", "", "See that rank's own error above", host_name()
    # ConfigErrors is made from a list: it arrives as the ConfigError that it is, with the list in its text.
    kind = next(kind for kind in type(error).__mro__ if kind.__init__ is MegatronLiteError.__init__)  # type: ignore[misc]
    return kind, error.problem, error.rule, error.fix, host_name()
