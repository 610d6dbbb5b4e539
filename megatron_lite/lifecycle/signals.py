"""Signal handling while the main thread is blocked in native code."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

PATIENCE = 5.0
"""Seconds that the main thread has to run the handler of a signal."""


class SignalWatch:
    """Thread that notices signals whose Python handler does not get to run.

    A rendezvous, a collective or the start of a device waits in C++ for minutes; a Python handler runs only after that,
    and the process would be killed (Slurm: 30 s after SIGTERM) before it has reacted. A context manager.

    Args:
        is_watched: whether a signal number is to be noticed now.
        on_unhandled: called from the thread with the signal number; it ends the process.
    """

    def __init__(self, is_watched: Callable[[int], bool], on_unhandled: Callable[[int], None]) -> None:
        self._is_watched = is_watched
        self._on_unhandled = on_unhandled
        self._handled = 0.0
        self._pipe = (-1, -1)
        self._before = -1

    def handled(self) -> None:
        """Note that a handler runs; to be called by it."""
        self._handled = time.monotonic()

    def __enter__(self) -> SignalWatch:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # The interpreter's own C handler writes the number of each signal there, whatever the main thread does.
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._run, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._pipe[1])  # ends the thread

    def _run(self, source: int) -> None:
        while number := os.read(source, 1):
            received = time.monotonic()
            if not self._is_watched(number[0]):
                continue
            time.sleep(PATIENCE)
            # The handler may have run a moment before this thread was woken.
            if self._handled < received - 1.0 and self._is_watched(number[0]):
                self._on_unhandled(number[0])
        os.close(source)
