"""exit_status.json in --save: how the last job of a run ended, for the scripts that decide whether to queue another."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from megatron_lite.checkpoint.catalog import announced
from megatron_lite.checkpoint.durable import replace_file
from megatron_lite.train.stopping import Stop

EXIT_STATUS_NAME = "exit_status.json"


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How a job ended.

    Attributes:
        status: completed, time_limit, signal, kill_switch, exit_flag or error.
        message: the last line of the log, or the error.
        iteration: iterations of the run that were finished; None: it failed before it knew.
        saved_iteration: the checkpoint that the next start goes on from; None: there is none.
        time: UTC, as ISO 8601 has it.
        host: where the first failure showed, if status is error; else empty.
        rank: on which rank; None unless status is error.
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
    try:
        return ExitStatus(**json.loads((folder / EXIT_STATUS_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class ExitRecord:
    """Writes exit_status.json when the job that it is wrapped around ends, however it ends.

    A context manager: entered before anything can fail, and left after the last save. Of the ranks that fail, the first
    to get here is the one whose words stay: the others only lost their partner.

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

    def begin(
        self, iteration: Callable[[], int], barrier: Callable[[], None], failed_saves: Sequence[int] = ()
    ) -> None:
        """Training begins, or goes on after a rollback: the last job's file goes.

        Args:
            iteration: asked for the number of finished iterations at the end.
            barrier: waits for all ranks, so that rank 0 removes no file but the last job's.
            failed_saves: a list that grows while training goes on.
        """
        if self._folder is not None and self._rank == 0:
            (self._folder / EXIT_STATUS_NAME).unlink(missing_ok=True)
        barrier()
        self._iteration = iteration
        self._failed_saves.append(failed_saves)

    def end(self, stop: Stop) -> None:
        """Training ended for this reason; it is written down on leaving."""
        self._stop = stop

    def __enter__(self) -> ExitRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ends the job is worth more than a disk that has no room for the note of it.
        with contextlib.suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                self._write(Stop("signal", "interrupted: stopped at once, without saving"))
            elif error is not None:
                self._write_error(error)
            elif self._stop is not None and self._rank == 0:
                self._write(self._stop)

    def _write(self, stop: Stop) -> None:
        if self._folder is not None and self._folder.is_dir():
            replace_file(self._folder / EXIT_STATUS_NAME, self._encode(stop.status, stop.message))

    def _write_error(self, error: BaseException) -> None:
        if self._folder is None or not self._folder.is_dir():
            return
        path = self._folder / EXIT_STATUS_NAME
        before = read_exit_status(self._folder)
        if self._iteration is None and before is not None and before.status == "completed":
            return  # a start that was refused does not undo what was completed here
        message = str(error) or type(error).__name__
        data = self._encode("error", message, host=socket.gethostname(), rank=self._rank)
        if self._iteration is None:
            replace_file(path, data)
            return
        # Refused where another rank has been first.
        with path.open("xb") as file:
            file.write(data)

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
