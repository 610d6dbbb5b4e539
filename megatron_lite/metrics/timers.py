"""Named timers for the parts of an iteration."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

_OFF: AbstractContextManager[None] = nullcontext()


class Timers:
    """Adds up the seconds spent in named blocks: `with timers("forward-backward"): …`.

    Timers may nest; an inner block's time counts in the outer one too. An accelerator runs behind the program, so a
    running timer waits for it at both ends, through the `synchronize` handed in. That costs speed, which is why a block
    says from which --timing-log-level on it is measured (1: the parts of a step, 2: every micro-batch).

    Args:
        level: blocks up to this level are measured; 0: none.
        synchronize: waits until the device has done all that was asked of it.
        clock: seconds from any origin; injected by tests.
    """

    def __init__(
        self, level: int, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._level = level
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []

    def __call__(self, name: str, level: int = 1) -> AbstractContextManager[None]:
        """A context that adds its duration to `name`, or one that does nothing above the measured level."""
        return _OFF if level > self._level else _Block(self, name)

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call, in order of first use; the counters start again at zero."""
        assert not self._open, f"timers are still running: {self._open}"
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _start(self, name: str) -> float:
        assert name not in self._open, f"timer {name} is inside itself and would count its time twice"
        # The outer name comes first in the report although its block ends last.
        self._seconds.setdefault(name, 0.0)
        self._open.append(name)
        self._synchronize()
        return self._clock()

    def _stop(self, name: str, started: float, failed: bool) -> None:
        if not failed:  # a failed device may never answer
            self._synchronize()
        self._seconds[name] += self._clock() - started
        self._open.remove(name)


class _Block:
    """One use of a timer."""

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
