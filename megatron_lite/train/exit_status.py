"""exit_status.json in --save: how the last job of a run ended, for the scripts that decide whether to queue another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron_lite.checkpoint.catalog import announced
from megatron_lite.checkpoint.durable import replace_file
from megatron_lite.errors import failed_rank
from megatron_lite.train.stopping import Stop

EXIT_STATUS_NAME = "exit_status.json"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How a job ended.

    Attributes:
        status: completed, time_limit, signal, kill_switch, exit_flag or error.
        message: why it ended, as the log has it, or the error.
        iteration: iterations of the run that were finished; None: it failed before it knew.
        saved_iteration: the checkpoint that the next start goes on from; None: there is none.
        time: UTC, as ISO 8601 has it.
        host: where it failed first, if status is error; else empty.
        rank: which rank failed first; None unless status is error.
        failed_saves: iterations of this job whose saves failed, whatever --on-failed-save made of it.
    """

    status: str
    message: str
    iteration: int | None = None
    saved_iteration: int | None = None
    time: str = ""
    host: str = ""
    rank: int | None = None
    failed_saves: Sequence[int] = ()


def read_exit_status(folder: Path) -> ExitStatus | None:
    """How the last job that saved in `folder` ended; None while it runs, or if it was killed before it could say."""
    return _decode(_content(folder / EXIT_STATUS_NAME))


class ExitRecord:
    """Writes exit_status.json when the job that it is wrapped around ends, however it ends.

    A context manager: entered before anything can fail, and left after the last save. Of the ranks that fail, the first
    to get here is the one whose words stay: the others only lost their partner. What the file says when the record is
    entered is the last job's, and goes as soon as this job has all its ranks.

    Where training does not handle SIGTERM and SIGUSR1 (while it loads, say), the process still dies of them, but writes
    that down first. One that comes while an error ends the job already, as torchrun's to the partners of a killed rank,
    is passed over, so that the error is written down.

    Args:
        save: the folder of --save; empty: nothing is written. An error makes no folder.
        rank: this rank. Rank 0 writes everything but errors.
    """

    def __init__(self, save: str, rank: int) -> None:
        self._folder = Path(save) if save else None
        self._rank = rank
        self._iteration: Callable[[], int] | None = None
        self._failed_saves: list[Sequence[int]] = []
        self._stop: Stop | None = None
        self._last_job: bytes | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None

    def start(self) -> None:
        """The job has met its ranks: from here on, the file says how this one ended or is not there."""
        if self._folder is not None and self._rank == 0:
            self._forget_last_job(self._folder / EXIT_STATUS_NAME)

    def begin(self, iteration: Callable[[], int], failed_saves: Sequence[int] = ()) -> None:
        """Training begins, or goes on after a rollback.

        Args:
            iteration: asked for the number of finished iterations at the end.
            failed_saves: a list that grows while training goes on.
        """
        self._iteration = iteration
        self._failed_saves.append(failed_saves)

    def end(self, stop: Stop) -> None:
        """Training ended for this reason; it is written down on leaving."""
        self._stop = stop

    def __enter__(self) -> ExitRecord:
        if self._folder is not None:
            self._last_job = _content(self._folder / EXIT_STATUS_NAME)
        self._handlers = {number: signal.signal(number, self._die) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ends the job is worth more than a disk that has no room for the note of it.
        with contextlib.suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                what = "interrupted" if self._received is None else f"{self._received.name} received"
                self._write(Stop("signal", f"{what}: stopped at once, without saving"))
            elif error is not None:
                self._write_error(error)
            elif self._stop is not None and self._rank == 0:
                self._write(self._stop)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._received is not None:
            os.kill(os.getpid(), self._received)

    def _die(self, number: int, frame: FrameType | None) -> None:
        if sys.exc_info()[0] is None:
            self._received = signal.Signals(number)
            raise KeyboardInterrupt

    def _write(self, stop: Stop) -> None:
        if self._folder is not None and self._folder.is_dir():
            replace_file(self._folder / EXIT_STATUS_NAME, self._encode(stop.status, stop.message))

    def _write_error(self, error: BaseException) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        path = self._folder / EXIT_STATUS_NAME
        self._forget_last_job(path)
        last = _decode(self._last_job)
        if self._iteration is None and self._last_job is not None and last is not None and last.status == "completed":
            data = self._last_job  # a start that was refused does not undo what was completed here
        else:
            first = failed_rank(error)
            host, rank = (first.host, first.rank) if first else (socket.gethostname(), self._rank)
            data = self._encode("error", str(error) or type(error).__name__, host=host, rank=rank)
        # Refused where another rank has been first.
        with path.open("xb") as file:
            file.write(data)

    def _forget_last_job(self, path: Path) -> None:
        """Removes the file, unless a rank of this job wrote it."""
        if self._last_job is not None and _content(path) == self._last_job:
            path.unlink(missing_ok=True)

    def _encode(self, status: str, message: str, *, host: str = "", rank: int | None = None) -> bytes:
        assert self._folder is not None
        saved = announced(self._folder) or ""
        record = ExitStatus(
            status=status,
            message=message,
            iteration=self._iteration() if self._iteration is not None else None,
            saved_iteration=int(saved) if saved.isdecimal() else None,
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            host=host,
            rank=rank,
            failed_saves=[iteration for failed in self._failed_saves for iteration in failed],
        )
        return (json.dumps(asdict(record), indent=2) + "\n").encode()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _decode(content: bytes | None) -> ExitStatus | None:
    try:
        return None if content is None else ExitStatus(**json.loads(content))
    except (ValueError, TypeError):
        return None
