"""Worker process pool with one pipe per worker.

They are spawned, not forked: a fork would copy the locks of the parent's threads (the progress bar's, a tokenizer
library's). A pipe each, and no shared queue, because a process that is killed while it holds a queue's lock stops
everybody.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from megatron_lite.errors import DataError

Task = TypeVar("Task")
Event = TypeVar("Event")
Advance = Callable[[Event], None]
Job = Callable[[Task, Callable[[Event], None]], None]


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool(Generic[Task, Event]):
    """Runs tasks in `count` processes; as a context manager it leaves none behind.

    Args:
        count: processes.
        make_job: called once in each process; what it returns is called with each task and a function to report
            events with. Must be picklable, as tasks and events.
    """

    def __init__(self, count: int, make_job: Callable[[], Job[Task, Event]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        # Ctrl-C goes to every process of the terminal, and is the parent's to handle. A blocked signal stays blocked in
        # a child, from its first instruction on; the parent is told of one that came meanwhile when it is unblocked.
        # (The library's tracker process goes first: starting it unblocks the signal.)
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

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        """Give out the tasks in order and yield what they report, as it comes.

        Raises:
            DataError: a worker raised one, or died.
        """
        left = iter(tasks)
        busy: list[_Worker] = []
        for worker in self._workers:
            task = next(left, None)
            if task is not None:
                self._send(worker, task)
                busy.append(worker)
        while busy:
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError) as error:
                    raise _died(worker.process) from error
                if kind == "refused":
                    raise DataError(content[0], rule=content[1], fix=content[2])
                if kind == "failed":
                    raise RuntimeError(f"in a worker process:\n{content}")
                if kind == "event":
                    yield content
                    continue
                task = next(left, None)
                if task is None:
                    busy.remove(worker)
                else:
                    self._send(worker, task)

    @staticmethod
    def _send(worker: _Worker, task: object) -> None:
        try:
            worker.pipe.send(task)
        except OSError as error:
            raise _died(worker.process) from error

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
    how = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"ended with {code}"
    return DataError(
        "A worker lives until its work is done",
        found=f"process {process.pid} {how}",
        fix="If memory ran out, give fewer --workers; the same command continues where this one stopped",
    )


def _serve(pipe: Connection, make_job: Callable[[], Job[Task, Event]]) -> None:
    """A worker's life; it ends when the parent is gone, which closes the pipe."""

    def tell(kind: str, content: object) -> None:
        try:
            pipe.send((kind, content))
        except OSError:  # nobody waits for the rest
            raise SystemExit from None

    try:
        job = make_job()
        while True:
            job(pipe.recv(), functools.partial(tell, "event"))
            tell("done", None)
    except EOFError:
        return
    except DataError as error:  # exceptions with keyword arguments do not survive pickling
        tell("refused", (error.problem, error.rule, error.fix))
    except Exception:
        tell("failed", traceback.format_exc())
