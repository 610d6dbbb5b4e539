"""Worker process pool: spawned processes with one pipe each.

Processes are spawned because a fork would copy the locks of the parent's threads (progress bar, tokenizer libraries).
Each has its own pipe because a process that is killed while it holds the lock of a shared queue blocks all others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from megatron_lite.errors import DataError

Task = TypeVar("Task")
Event = TypeVar("Event")
Job = Callable[[Task], Iterator[Event]]
"""Runs one task and yields events about its progress."""

QUEUED = 2
"""Tasks sent to a process before the first one is done: it has the next one while the parent copies and syncs files."""

SECONDS = 0.1
"""Time for which a process collects events: each message costs the parent a tenth of a millisecond."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    tasks: int = 0
    """Tasks that were sent and are not done."""


class Pool(Generic[Task, Event]):
    """Runs tasks in `count` processes; as a context manager it ends them.

    Args:
        count: number of processes.
        make_job: called once in each process; returns the function that runs a task. It must be picklable, as must
            tasks and events.
    """

    def __init__(self, count: int, make_job: Callable[[], Job[Task, Event]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        # Ctrl-C reaches every process of the terminal; only the parent handles it. A signal that is blocked here stays
        # blocked in the children from their first instruction on, and reaches the parent after it is unblocked.
        # (multiprocessing's resource tracker is started before that, since its start unblocks the signal.)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, make_job), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self, tasks: Sequence[Task]) -> Iterator[list[Event]]:
        """Distribute the tasks in order and yield their events as they arrive, those of a tenth of a second together.

        Raises:
            DataError: a worker raised one, or was killed.
        """
        left = iter(tasks)
        for worker in self._workers * QUEUED:
            self._send_next(worker, left)
        while busy := [worker for worker in self._workers if worker.tasks]:
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError) as error:
                    raise _died(worker.process) from error
                if kind == "error":
                    raise DataError(content[0], rule=content[1], fix=content[2])
                if kind == "crash":
                    raise RuntimeError(f"in a worker process:\n{content}")
                if kind == "done":
                    worker.tasks -= 1
                    self._send_next(worker, left)
                yield content

    @staticmethod
    def _send_next(worker: _Worker, left: Iterator[Task]) -> None:
        task = next(left, None)
        if task is None:
            return
        worker.tasks += 1
        # A process that has ended is reported when its pipe is read, where the error that ended it may come first.
        with contextlib.suppress(OSError):
            worker.pipe.send(task)

    def __enter__(self) -> Pool[Task, Event]:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _died(process: BaseProcess) -> DataError:
    process.join(5)
    code = process.exitcode
    how = (
        f"was killed by signal {-code} ({signal.Signals(-code).name})"
        if code and code < 0
        else f"ended with exit code {code}"
    )
    return DataError(
        f"Worker process {process.pid} {how} before its work was done",
        fix="Give the same command again: it continues where this one stopped. If memory ran out (dmesg names killed "
        "processes), give fewer --workers",
    )


def _serve(pipe: Connection, make_job: Callable[[], Job[Task, Event]]) -> None:
    """Run tasks in a worker process until the parent closes the pipe or ends."""

    def send(kind: str, content: object) -> None:
        try:
            pipe.send((kind, content))
        except OSError:  # the parent has ended
            raise SystemExit from None

    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        """Take tasks off the pipe at once: a parent that waits for room in it reads no events."""
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    tasks.put(pipe.recv())
        finally:
            tasks.put(None)

    threading.Thread(target=receive, daemon=True).start()
    try:
        job = make_job()
        while (task := tasks.get()) is not None:
            events, sent = list[Any](), time.monotonic()
            for event in job(task):
                events.append(event)
                if time.monotonic() - sent >= SECONDS:
                    send("events", events)
                    events, sent = [], time.monotonic()
            send("done", events)
    except DataError as error:  # exceptions with keyword arguments cannot be pickled
        send("error", (error.problem, error.rule, error.fix))
    except Exception:
        send("crash", traceback.format_exc())
