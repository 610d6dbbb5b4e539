"""Tests of interruptible calls: results, errors, time-outs, and signals during a call."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_lite.backend.interruptible import first_line, run_interruptibly


def test_results_and_errors_are_passed_on():
    assert run_interruptibly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 // 0)


def test_an_error_in_poll_ends_the_wait():
    over = threading.Event()

    def poll():
        over.set()
        raise KeyError("another rank failed")

    with pytest.raises(KeyError):
        run_interruptibly(lambda: over.wait(10), seconds=10, poll=poll)


@pytest.mark.parametrize("polls", [False, True])
def test_the_wait_ends_after_its_time_limit(polls):
    over = threading.Event()
    with pytest.raises(TimeoutError):
        run_interruptibly(lambda: over.wait(10), seconds=0.05, poll=(lambda: None) if polls else None)
    over.set()


@pytest.mark.parametrize("polls", ["None", "lambda: None"])
def test_a_signal_ends_a_wait_and_the_process(polls):
    """A thread that stays in a call without the GIL, as in C++."""
    code = f"""
import socket, sys
from megatron_lite.backend.interruptible import run_interruptibly
held = socket.create_server(("127.0.0.1", 0))
print("waiting", flush=True)
try:
    run_interruptibly(held.accept, poll={polls})
finally:
    print("left", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out == "left\n" and process.returncode == 130


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no route", "no route"),
        ("no route\nException raised from a at b\nframe #0: c", "no route"),
        ("[a.cpp:1] timed out frame #0: x\nframe #1: y", "[a.cpp:1] timed out"),
        ("", "RuntimeError"),
    ],
)
def test_errors_are_shown_without_the_stack_of_cpp(text, line):
    assert first_line(RuntimeError(text)) == line
