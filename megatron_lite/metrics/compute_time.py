"""Time of one rank by part of an iteration: compute, data reading, gradient reduction, optimizer.

All ranks finish an iteration together, so its duration shows no straggler; the busy time (compute and data) of each
rank does. The actions of the pipeline executor exclude messages and the gradient reduction; collectives of tensor
parallelism are included, so that the ranks of one tensor-parallel group have similar times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from megatron_lite.backend.base import Backend

PARTS = ("compute", "data", "gradients", "optimizer")
"""Parts in the order of `take`. The rest of an iteration is messages between pipeline stages and waiting for them."""
_PART_OF = {
    "forward-compute": "compute",
    "backward-compute": "compute",
    "weight-gradients": "compute",
    "batch-generator": "data",
    "all-grads-sync": "gradients",
    "optimizer": "optimizer",
}
"""Part of each timer of executor and engine that counts."""


def measuring_interval(log_interval: int, ranks: int) -> int:
    """Return the iterations between measurements: a multiple of the log interval, and of one rank alone at least 10.

    A measured iteration is read before the next one is enqueued, so that the device is idle for a moment.
    """
    return log_interval if ranks > 1 else log_interval * math.ceil(10 / log_interval)


def busy_seconds(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Return each rank's seconds of compute and data, from the results of `take`; 0: unknown."""
    return [compute + data for compute, data, *_ in ranks]


def mean_parts(ranks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean seconds of each part over the ranks whose times are known; empty: there are none."""
    known = [seconds for seconds in ranks if any(seconds)]
    return (
        {name: sum(column) / len(known) for name, column in zip(PARTS, zip(*known, strict=True), strict=True)}
        if known
        else {}
    )


class ComputeTime:
    """Measures the iterations that `interval` divides, with marks in the device's queue: the host never waits.

    Args:
        backend: sets the marks.
        interval: iterations from one measurement to the next; 0: none.
    """

    def __init__(self, backend: Backend, interval: int) -> None:
        self._backend = backend
        self._interval = interval
        self._marks: list[tuple[str, Any, Any]] = []
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
        return _Marked(self, _PART_OF[name], inner) if self._on and name in _PART_OF else inner

    def take(self) -> list[float]:
        """Return this iteration's seconds of each of PARTS, and end the measurement; zeros: the device is not done."""
        sums = dict.fromkeys(PARTS, 0.0)
        for part, begin, end in self._marks:
            seconds = self._backend.seconds_between(begin, end)
            if seconds is None:
                sums = dict.fromkeys(PARTS, 0.0)
                break
            sums[part] += seconds
        self._on = False
        self._marks.clear()
        return list(sums.values())


class _Marked:
    """Context manager of one measured block."""

    def __init__(self, clock: ComputeTime, part: str, inner: AbstractContextManager[None]) -> None:
        self._clock = clock
        self._part = part
        self._inner = inner
        self._begin: Any = None

    def __enter__(self) -> None:
        self._begin = self._clock._backend.mark()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)
        self._clock._marks.append((self._part, self._begin, self._clock._backend.mark()))
