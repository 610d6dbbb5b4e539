"""Worker pool: events, errors, killed workers; and the progress displays."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
from itertools import chain

import pytest

from megatron_lite.data.preparation.pool import Pool
from megatron_lite.data.preparation.progress import BarProgress, LineProgress
from megatron_lite.data.preparation.worker import Step
from megatron_lite.errors import DataError


def square(task):
    if task == "refuse":
        raise DataError("a problem", rule="a rule", fix="do that")
    if task == "fail":
        raise ZeroDivisionError("oh")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        yield "still here"
        return
    if isinstance(task, str):
        yield from (f"{number} {task[:1000]}" for number in range(2000))
        return
    yield task * task


make_square = functools.partial(functools.partial, square)


@pytest.mark.slow
def test_pool():
    before = multiprocessing.active_children()
    with Pool(2, make_square) as pool:
        assert sorted(chain.from_iterable(pool.run(range(20)))) == [i * i for i in range(20)]
        assert list(pool.run(["interrupt"])) == [["still here"]], "only the parent handles Ctrl-C"
        # More than both pipes hold: a worker takes a task while its events wait for the parent.
        assert len(list(chain.from_iterable(pool.run(["x" * 1_000_000] * 6)))) == 6 * 2000
        with pytest.raises(DataError, match=r"a problem\. a rule\. do that"):
            list(pool.run([1, "refuse"]))
    for task, error, message in (("fail", RuntimeError, "ZeroDivisionError: oh"), ("die", DataError, "SIGKILL")):
        with Pool(1, make_square) as pool, pytest.raises(error, match=message):
            list(pool.run([1, task, 2]))
    with Pool(1, make_square) as pool, pytest.raises(DataError, match=r"a problem"):
        for _ in pool.run([1, "refuse", 2]):
            for process in set(multiprocessing.active_children()) - set(before):
                process.join()  # it has refused the second task before it is sent the third
    assert set(multiprocessing.active_children()) <= set(before)


def test_progress_lines_are_those_of_megatron():
    now = [0.0]
    stream = io.StringIO()
    lines = LineProgress(stream, interval=100, clock=lambda: now[0])
    lines.start(4_000_000, 2_000_000, 3)
    for _ in range(3):
        now[0] += 1
        lines.advance(Step(70, 1_000_000, 500_000))
    assert stream.getvalue().splitlines() == [
        "Continuing: 3 units are done, 2.0 of 4.0 MB left",
        "Processed 140 documents (70.0 docs/s, 1.00 MB/s). ETA 00:00:02",
        "Processed 210 documents (70.0 docs/s, 1.00 MB/s). ETA 00:00:01",
    ]


def test_progress_lines_of_stages():
    now = [0.0]
    stream = io.StringIO()
    lines = LineProgress(stream, clock=lambda: now[0])
    lines.start(10, 10, 0)
    for what in ("shuffle", "join"):
        lines.stage(what, 4)
        for _ in range(4):
            now[0] += 3
            lines.piece()
    assert stream.getvalue().splitlines() == [
        "shuffle: 2 of 4 pieces. ETA 00:00:06",
        "shuffle: 4 of 4 pieces. ETA 00:00:00",
        "join: 2 of 4 pieces. ETA 00:00:06",
        "join: 4 of 4 pieces. ETA 00:00:00",
    ]


def test_bar_shows_rates(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    bar = BarProgress(stream)
    bar.start(100, 50, 1)
    bar.advance(Step(10, 1000, 25))
    bar.stage("join", 2)
    bar.piece()
    bar.close()
    assert "Continuing: 1 units are done" in stream.getvalue()
