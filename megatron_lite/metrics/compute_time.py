"""Busy time of one rank: measures data reading, forward and backward of an iteration, without waiting for other ranks.

All ranks finish an iteration together, so its duration shows no straggler. The actions of the pipeline executor exclude
messages and the gradient reduction; collectives of tensor parallelism are included, so that the ranks of one tensor-
parallel group have similar times.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from megatron_lite.backend.base import Backend

MEASURED = frozenset({"batch-generator", "forward-compute", "backward-compute", "weight-gradients"})
"""Timer names of the executor that count."""


class ComputeTime:
    """Measures the iterations that `interval` divides, with marks in the device's queue: the host never waits.

    Args:
        backend: sets the marks.
        interval: iterations from one measurement to the next; 0: none.
    """

    def __init__(self, backend: Backend, interval: int) -> None:
        self._backend = backend
        self._interval = interval
        self._marks: list[tuple[Any, Any]] = []
        self._on = False

    @property
    def measures(self) -> bool:
        """Return whether the current iteration is measured; equal on all ranks."""
        return self._on

    def begin(self, iteration: int) -> None:
        """Begin an iteration."""
        self._on = bool(self._interval) and iteration % self._interval == 0
        self._marks.clear()

    def around(self, name: str, inner: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """Return `inner`, with marks at both ends if the block of that name is measured."""
        return _Marked(self, inner) if self._on and name in MEASURED else inner

    def take(self) -> float:
        """Return the seconds of this iteration's blocks, and end the measurement; 0: the device is not done."""
        seconds = [self._backend.seconds_between(begin, end) for begin, end in self._marks]
        self._on = False
        self._marks.clear()
        return 0.0 if None in seconds else sum(part for part in seconds if part is not None)


class _Marked:
    """Context manager of one measured block."""

    def __init__(self, clock: ComputeTime, inner: AbstractContextManager[None]) -> None:
        self._clock = clock
        self._inner = inner
        self._begin: Any = None

    def __enter__(self) -> None:
        self._begin = self._clock._backend.mark()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        self._clock._marks.append((self._begin, self._clock._backend.mark()))
