"""Interruptible calls: runs blocking C++ calls in a thread, so that the main thread handles signals."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_interruptibly(call: Callable[[], T], *, seconds: float = 0.0, poll: Callable[[], None] | None = None) -> T:
    """Run `call` in a thread and return its result or raise its error.

    Python runs signal handlers in the main thread between two bytecodes, never inside a call into C++, such as one
    that waits for another rank. If the wait is abandoned, the process must end: it then ends without Python's
    finalization, which crashes a thread inside C++.

    Args:
        call: the function to run.
        seconds: longest wait; 0: no limit.
        poll: called every 20 ms; an error that it raises ends the wait. None: no polling.

    Raises:
        TimeoutError: the call took longer than `seconds`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    # An event instead of Thread.join: after an interrupt, join takes a running thread for ended (bpo-45274).
    done = threading.Event()
    deadline = time.monotonic() + seconds
    threading.Thread(target=body, name="interruptible call", daemon=True).start()
    try:
        if poll is None:
            # Without polling, so that the stack stays the same: the watchdog takes a change for progress.
            done.wait(seconds or None)
        else:
            while not done.is_set() and not (seconds and time.monotonic() > deadline):
                done.wait(0.02)
                poll()
        if not done.is_set():
            raise TimeoutError(f"timed out after {seconds:g} s")
    except BaseException as error:
        if not done.is_set():
            atexit.register(_end_if_running, done, 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _end_if_running(done: threading.Event, code: int) -> None:
    if not done.is_set():
        end_at_once(code)


def end_at_once(code: int) -> None:
    """End the process without Python's finalization; output is flushed first.

    When a collective fails because another rank has ended, a thread of gloo releases its tensors. If Python is
    finalizing then, the thread cannot take the GIL, and the C++ runtime aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_line(error: BaseException) -> str:
    """Return the message of an error without the C++ stack that torch appends."""
    text = re.split(r"Exception raised from |frame #\d", str(error))[0].strip()
    return text.splitlines()[0] if text else type(error).__name__
