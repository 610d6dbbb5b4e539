"""Collective error handling: runs a step on all ranks or on rank 0, and raises its error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_lite.backend.environment import host_name
from megatron_lite.backend.group import Group
from megatron_lite.errors import FailedRank, MegatronLiteError, TrainingError

T = TypeVar("T")
_Failure = tuple[type[MegatronLiteError], str, str, str, str]


def run_on_all_ranks(world: Group, step: Callable[[], T]) -> T:
    """Run `step` on every rank, wait for all, and return this rank's result; a collective call.

    Raises:
        MegatronLiteError: `step` failed on some rank. Every rank raises the first such rank's error, with its class,
            host and rank (failed_rank); a TrainingError stands for an error of another kind.
        Exception: `step` raised an error of another kind on this rank.
    """
    own: Exception | None = None
    try:
        result = step()
    except Exception as error:
        own = error
    failures = world.all_gather_object(None if own is None else _describe(own))
    if own is not None and (world.size == 1 or not isinstance(own, MegatronLiteError)):
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            kind, problem, rule, fix, host = failure
            failed = FailedRank(host, rank)
            failed.__cause__ = own
            raise kind(f"On {host}, rank {rank}: {problem}", rule=rule, fix=fix) from failed
    return result


def broadcast_from_rank0(world: Group, step: Callable[[], T]) -> T:
    """Run `step` on rank 0 and return its result on every rank; a collective call.

    Raises:
        MegatronLiteError: `step` failed; see run_on_all_ranks.
    """
    result = run_on_all_ranks(world, lambda: step() if world.rank == 0 else None)
    received: T = world.all_gather_object(result)[0]
    return received


def _describe(error: Exception) -> _Failure:
    """Return class, problem, rule and fix of an error, and this host."""
    host = host_name()
    if isinstance(error, MegatronLiteError):
        # The nearest class with the common constructor: ConfigErrors, for one, has another.
        kind = next(kind for kind in type(error).__mro__ if kind.__init__ is MegatronLiteError.__init__)  # type: ignore[misc]
        return kind, error.problem, error.rule, error.fix, host
    return TrainingError, f"{type(error).__name__}: {error}", "", "See that rank's own error above", host
