"""Failure reporting: names the failed rank, host and phase, and ends the other ranks."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_lite.backend.environment import host_name
from megatron_lite.backend.interruptible import end_at_once
from megatron_lite.backend.phases import phase_of
from megatron_lite.backend.watchdog import Failure, Watchdog, WatchdogTimeouts
from megatron_lite.config.layout import coordinates, describe_coordinates
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import FailedRank, MegatronLiteError, TrainingError, failed_rank

if TYPE_CHECKING:
    from megatron_lite.backend.base import Backend

OnAbort = Callable[[str, int, str], None]

_TRANSPORT = ("gloo", "nccl", "connection", "socket", "process group", "timed out", "tcpstore", "watchdog")
"""Words in the errors that a transport raises when the peer is gone."""


@contextmanager
def report_failures(backend: Backend, parallel: ParallelConfig, on_abort: OnAbort | None = None) -> Iterator[None]:
    """Report any exception with host, rank, coordinates and phase, and end the other ranks.

    Args:
        backend: this rank's.
        parallel: parallel sizes and timeouts.
        on_abort: called with host, rank and text of the first failure before the heartbeat thread ends this process.

    Raises:
        TrainingError: another rank failed first; replaces the transport's error that follows from it.
    """
    at = coordinates(backend.rank, parallel)
    host = backend.launch.host or host_name()
    name = f"{host} rank {backend.rank} ({describe_coordinates(at, parallel)})"
    store = backend.watch_store()
    if store is None:
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (MegatronLiteError, KeyboardInterrupt)):
                _print_failure(name, error)
            raise
        return

    watchdog = Watchdog(
        store,
        backend.launch,
        name=name,
        phases=backend.phases,
        timeouts=WatchdogTimeouts.from_collective_timeout(60 * parallel.distributed_timeout_minutes),
        on_abort=on_abort,
    )

    def ended_by(first: Failure, error: BaseException) -> TrainingError:
        ended = TrainingError(
            f"The job ended because a rank failed: {first.text.rstrip('.')}; {name} was in {phase_of(error)}",
            fix="Read the output of the failed rank for its cause. With --save and --load, the same command then "
            "resumes from the "
            "latest checkpoint",
        )
        ended.shared, ended.silent = True, not first.is_printed_by(backend.rank, backend.local_rank)
        return ended

    try:
        yield
    except BaseException as error:
        atexit.register(end_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
        if _is_of_transport(error) and (first := watchdog.first_failure()) is not None:
            raise ended_by(first, error) from FailedRank(first.host, first.rank)
        if isinstance(error, MegatronLiteError) and not error.shared and (place := failed_rank(error)) is not None:
            error.shared, error.silent = True, place.rank != backend.rank
        # Ranks that fail alike have the description in common: a fix may list what is on one rank's disk.
        description = error.description if isinstance(error, MegatronLiteError) else _text(error)
        first = watchdog.fail(f"{name} failed in {phase_of(error)}: {_text(error)}", description)
        alike = first.rank != backend.rank and first.error == description
        if isinstance(error, MegatronLiteError):
            error.shared, error.silent = True, error.silent if error.shared else alike
        elif not alike:
            _print_failure(name, error)
        watchdog.end()
        if alike and not isinstance(error, (MegatronLiteError, KeyboardInterrupt)):
            # One stack is printed, that of the first rank.
            raise ended_by(first, error) from FailedRank(first.host, first.rank)
        raise
    watchdog.leave()


def _is_of_transport(error: BaseException) -> bool:
    """Return whether an error is one by which a transport reports the loss of a peer."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, (RuntimeError, OSError)) and any(word in text for word in _TRANSPORT)


def _print_failure(name: str, error: BaseException) -> None:
    sys.stderr.write(f"[{name}] failed in {phase_of(error)}: {_text(error)}\n")
    sys.stderr.flush()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
