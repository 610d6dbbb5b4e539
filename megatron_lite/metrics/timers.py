"""Named timers for the parts of an iteration."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

_OFF: AbstractContextManager[None] = nullcontext()


class Timers:
    """Accumulates the seconds spent in named blocks: `with timers("forward-backward"): …`.

    Timers may nest; the time of an inner block is included in the outer block. Accelerators run asynchronously, so a
    timer synchronizes the device at both ends. Since that costs time, each block has a level: it is measured from that
    --timing-log-level on (1: parts of a step, 2: every micro-batch).

    Args:
        level: blocks up to this level are measured; 0: none.
        synchronize: waits for all queued work of the device.
        clock: monotonic seconds; injected by tests.
    """

    def __init__(
        self, level: int, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._level = level
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []

    @property
    def on(self) -> bool:
        """Return whether any block is measured."""
        return self._level > 0

    def __call__(self, name: str, level: int = 1) -> AbstractContextManager[None]:
        """Return a context manager that adds its duration to `name`, if `level` is measured."""
        return _OFF if level > self._level else _Block(self, name)

    def take(self) -> dict[str, float]:
        """Return seconds by name since the last call, in order of first use, and reset them."""
        assert not self._open, f"timers are still running: {self._open}"
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _start(self, name: str) -> float:
        assert name not in self._open, f"timer {name} is inside itself and would count its time twice"
        # Outer names precede inner names in the report.
        self._seconds.setdefault(name, 0.0)
        self._open.append(name)
        self._synchronize()
        return self._clock()

    def _stop(self, name: str, started: float, failed: bool) -> None:
        if not failed:  # a failed device may never respond
            self._synchronize()
        self._seconds[name] += self._clock() - started
        self._open.remove(name)


class _Block:
    """Context manager of one timed block."""

    def __init__(self, timers: Timers, name: str) -> None:
        self._timers = timers
        self._name = name
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = self._timers._start(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timers._stop(self._name, self._started, kind is not None)
