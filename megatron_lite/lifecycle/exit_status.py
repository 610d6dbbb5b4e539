"""exit_status.json: records how a job ended, for scripts that decide on resubmission.

Imports no torch: a job that fails to import it must be able to say so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron_lite.backend.environment import Launch
from megatron_lite.errors import CheckpointError, failed_rank
from megatron_lite.lifecycle.signals import SignalWatch
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.catalog import latest_iteration
from megatron_lite.runs.exit_status import COMPLETED_NAME, EXIT_STATUS_NAME, ExitStatus, completed_iteration, read_bytes
from megatron_lite.runs.lock import FolderLock, read_owner

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ATTEMPTS, _PAUSE = 5, 0.2
"""How often, and how many seconds apart, a rank that fails early tries to get the lock, which others hold briefly."""


class ExitRecord:
    """Writes exit_status.json when the job it is wrapped around ends, however it ends, and releases the folder's lock.

    A context manager, entered as soon as --save is known and left after the last save. On entry rank 0 removes the
    file of the previous job. If several ranks fail, the first to write is kept: the others have only lost their peer.

    Nothing is written to a folder whose lock another job holds. Rank 0 holds the lock for the job from `attempt` on; a
    rank that fails earlier takes it only for as long as it writes.

    Where training does not handle SIGTERM and SIGUSR1 (while it loads, say), the process still dies of them, but writes
    that down first, even while the main thread waits in native code, as in a rendezvous. One that comes while an error
    ends the job already, as torchrun's to the partners of a killed rank, is passed over, so that the error is written.

    Args:
        save: the folder of --save; empty: nothing is written. An error makes no folder.
        launch: this rank. Rank 0 writes everything but errors.
    """

    def __init__(self, save: str, launch: Launch) -> None:
        self._folder = Path(save) if save else None
        self._launch = launch
        self._lock = FolderLock(Path(save), process=launch.process, command="train", notify=_say)
        self._token = ""
        self._iteration: Callable[[], int] | None = None
        self._failed_saves: list[Sequence[int]] = []
        self._end: tuple[str, str] | None = None
        self._last_job: bytes | None = None
        self._waited = self._written = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._later: threading.Timer | None = None
        self._watch = SignalWatch(lambda number: signal.getsignal(number) == self._die, self._end_at_once)

    @property
    def lock(self) -> FolderLock | None:
        """The lock of the folder, where this rank holds it; None on other ranks, and without --save."""
        return self._lock if self._lock.token else None

    def attempt(self, seconds: float) -> str | None:
        """Try for some seconds to take the lock for the job; for rank 0, to be repeated until it is decided.

        Returns:
            Name of this holding of the lock, for `start` on every rank; empty without --save; None: not decided yet.

        Raises:
            CheckpointError: another job holds the lock, or the folder cannot be written to.
        """
        if self._folder is None:
            return ""
        deadline = time.monotonic() + seconds
        try:
            while not self._lock.attempt():
                self._waited = True
                if time.monotonic() > deadline:
                    return None
                time.sleep(min(seconds, _PAUSE))
            self._forget_last_job()
        except OSError as error:
            raise not_writable(self._folder, error) from error
        return self._lock.token

    def start(self, token: str | None) -> None:
        """Take note of what rank 0's `attempt` returned; None: the job was refused, and writes nothing."""
        if token is None:
            self._folder = None
        self._token = token or ""

    def begin(self, iteration: Callable[[], int], failed_saves: Sequence[int] = (), *, trains: bool = True) -> None:
        """Note that the run is loaded and its work begins, or goes on after a rollback.

        Args:
            iteration: asked for the number of finished iterations at the end.
            failed_saves: a list that grows while training goes on.
            trains: whether the job trains, so that the run is no longer known to be complete.
        """
        self._iteration = iteration
        self._failed_saves.append(failed_saves)
        if trains and self._folder is not None and self.lock is not None:
            (self._folder / COMPLETED_NAME).unlink(missing_ok=True)

    def end(self, status: str, message: str) -> None:
        """Note why the job ended; it is written down on leaving."""
        self._end = status, message

    def abort(self, host: str, rank: int, text: str) -> None:
        """Write down the failure of a rank, where this process is about to be ended from another thread."""
        with contextlib.suppress(OSError, CheckpointError):
            self._write("error", text, host=host, rank=rank)
        self._lock.release()

    def __enter__(self) -> ExitRecord:
        for number in _SIGNALS:
            # A shell's background job ignores Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._die)
        self._watch.__enter__()
        if self._folder is not None:
            self._last_job = read_bytes(self._folder / EXIT_STATUS_NAME)
            if self._last_job is not None and self._launch.rank == 0:
                with contextlib.suppress(OSError, CheckpointError), self._allowed() as allowed:
                    if allowed:
                        self._forget_last_job()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The job is ending: no second signal keeps it from saying why.
        self._watch.__exit__()
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        if self._later is not None:
            self._later.cancel()
        # What ends the job is worth more than a disk that has no room for the note of it.
        with contextlib.suppress(OSError, CheckpointError):
            if self._end is not None and (error is None or isinstance(error, KeyboardInterrupt)):
                if self._launch.rank == 0:
                    self._write(*self._end)
            elif isinstance(error, KeyboardInterrupt):
                what = "interrupted" if self._received is None else f"{self._received.name} received"
                self._write("signal", f"{what}: stopped at once, without saving")
            elif error is not None:
                first = failed_rank(error)
                host, rank = (first.host, first.rank) if first else (self._launch.host, self._launch.rank)
                self._write("error", str(error) or type(error).__name__, host=host, rank=rank)
        self._lock.release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._received is not None:
            os.kill(os.getpid(), self._received)

    def _die(self, number: int, frame: FrameType | None) -> None:
        self._watch.handled()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if sys.exc_info()[0] is not None:
            # An error may be ending the job; if it is handled after all, the signal counts.
            self._later = threading.Timer(1.0, os.kill, (os.getpid(), number))
            self._later.daemon = True
            self._later.start()
        else:
            self._received = signal.Signals(number)
            os.write(2, f"\n{self._received.name} received: stopping at once, without saving\n".encode())
            raise KeyboardInterrupt

    def _end_at_once(self, number: int) -> None:
        """End the process from another thread, because the main thread waits in native code."""
        name = signal.Signals(number).name
        os.write(2, f"\n{name} received: stopping at once, without saving\n".encode())
        with contextlib.suppress(OSError, CheckpointError):
            self._write("signal", f"{name} received: stopped at once, without saving")
        self._lock.release()
        os._exit(128 + number)

    def _write(self, status: str, message: str, *, host: str = "", rank: int | None = None) -> None:
        """Write the file, unless this job has done so already or the folder is another's."""
        if self._folder is None or not self._folder.is_dir():
            return
        with self._allowed() as allowed:
            if not allowed:
                return
            if status == "completed" and self._iteration is not None:
                self._note_completion(self._folder, self._iteration())
            self._forget_last_job()
            path = self._folder / EXIT_STATUS_NAME
            with contextlib.suppress(FileExistsError), path.open("xb") as file:
                self._written = True
                try:
                    file.write(self._encode(status, message, host or self._launch.host, rank))
                    file.flush()
                except OSError:
                    path.unlink()
                    raise

    @contextlib.contextmanager
    def _allowed(self) -> Iterator[bool]:
        """Whether this rank may write to the folder, for as long as the context lasts."""
        assert self._folder is not None
        if self._lock.token:
            self._lock.verify(now=True)
            yield True
            return
        if self._token:  # rank 0 holds the lock, or died with it
            owner = read_owner(self._folder)
            yield owner is not None and owner.token == self._token
            return
        try:
            for attempt in range(_ATTEMPTS):
                if taken := self._lock.try_acquire():
                    break
                time.sleep(_PAUSE * (attempt < _ATTEMPTS - 1))
            yield taken
        finally:
            self._lock.release()

    def _forget_last_job(self) -> None:
        """Remove the file, unless a rank of this job wrote it. The lock is held."""
        assert self._folder is not None
        path = self._folder / EXIT_STATUS_NAME
        content = read_bytes(path)
        if content is not None and not self._is_of_this_job(content):
            path.unlink(missing_ok=True)

    def _is_of_this_job(self, content: bytes) -> bool:
        if self._token or self._written:
            return True  # rank 0 has removed the last job's
        if self._launch.world_size == 1:
            return False
        if self._launch.start_id:
            status = ExitStatus.decode(content)
            return status is not None and status.job == self._launch.start_id
        # Nothing tells jobs apart: what came after this rank began is this job's, unless another one ran meanwhile.
        return content != self._last_job and not self._waited

    @staticmethod
    def _note_completion(folder: Path, iteration: int) -> None:
        if completed_iteration(folder) != iteration:
            replace_file(folder / COMPLETED_NAME, f"{iteration}\n".encode())

    def _encode(self, status: str, message: str, host: str, rank: int | None) -> bytes:
        assert self._folder is not None
        record = ExitStatus(
            status=status,
            message=message,
            iteration=self._iteration() if self._iteration is not None else None,
            saved_iteration=latest_iteration(self._folder),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            host=host,
            rank=rank,
            failed_saves=[iteration for failed in self._failed_saves for iteration in failed],
            job=self._launch.start_id,
        )
        return record.encode()


def not_writable(save: Path, error: OSError) -> CheckpointError:
    """Return the error for a --save folder that cannot be made or written to."""
    return CheckpointError(
        "--save must be a folder that can be written to",
        found=f"--save {save}: {error.strerror}",
        fix="Give --save a folder that you may write to, or change its permissions",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
