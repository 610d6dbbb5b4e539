"""Exit record: writes exit_status.json when a job ends, also on errors and signals; releases the folder's lock.

Imports no torch, so that a job which fails to import it still leaves an exit status.
"""

from __future__ import annotations

import contextlib
import math
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
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.catalog import latest_iteration
from megatron_lite.runs.exit_status import COMPLETED_NAME, EXIT_STATUS_NAME, ExitStatus, completed_iteration, read_bytes
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.lock_file import read_owner
from megatron_lite.system_errors import reason, remedy

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ATTEMPTS, _PAUSE = 5, 0.2
"""Attempts, and seconds between them, of a rank that fails early to get the lock, which others hold briefly."""
SIGNAL_PATIENCE = 5.0
"""Seconds that the main thread has to run the handler of a signal."""

REPEAT_SECONDS = 0.5
"""Seconds within which a second SIGINT counts as the first: a terminal sends Ctrl-C's signal to all processes of a job,
and the process that started the ranks (task_ranks.py, torchrun) forwards it to them, too."""


class ExitRecord:
    """Writes exit_status.json when the enclosed job ends, in any way, and releases the folder's lock.

    A context manager, entered as soon as --save is known and left after the last save. On entry rank 0 removes the
    file of the previous job. If several ranks fail, the file of the first one stays: the others have lost a peer.

    Nothing is written to a folder whose lock another job holds. Rank 0 holds the lock for the job from `attempt` on; a
    rank that fails earlier takes it for as long as it writes.

    While training does not handle SIGTERM and SIGUSR1 (during start-up), these signals end the process after the file
    is written, even while the main thread waits in native code, as in a rendezvous. A signal that arrives while an
    error ends the job (torchrun sends one to the peers of a killed rank) is ignored, so that the error is written.

    Args:
        save: the folder of --save; empty: nothing is written. An error creates no folder.
        launch: this rank. Rank 0 writes everything except errors.
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
        self._interrupted = -math.inf
        self._later: threading.Timer | None = None
        self._watch = _SignalWatch(self._die, self._end_at_once)

    @property
    def lock(self) -> FolderLock | None:
        """Lock of the folder, on the rank that holds it; None on other ranks, and without --save."""
        return self._lock if self._lock.token else None

    def attempt(self, seconds: float) -> str | None:
        """Try for some seconds to take the lock for the job; on rank 0, to be repeated until decided.

        Returns:
            The lock's token, for `start` on every rank; empty without --save; None: undecided.

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
        """Record the result of rank 0's `attempt`; None: the job was refused, and writes nothing."""
        if token is None:
            self._folder = None
        self._token = token or ""

    def begin(self, iteration: Callable[[], int], failed_saves: Sequence[int] = (), *, trains: bool = True) -> None:
        """Record that the run is loaded and its work begins, or continues after a rollback.

        Args:
            iteration: returns the number of finished iterations; called at the end.
            failed_saves: a list that grows during training.
            trains: the job trains, so that the run does not count as complete any more.
        """
        self._iteration = iteration
        self._failed_saves.append(failed_saves)
        if trains and self._folder is not None and self.lock is not None:
            (self._folder / COMPLETED_NAME).unlink(missing_ok=True)

    def end(self, status: str, message: str) -> None:
        """Record why the job ended; written on exit from the context."""
        self._end = status, message

    def abort(self, host: str, rank: int, text: str) -> None:
        """Write the failure of a rank, before another thread ends this process."""
        with contextlib.suppress(OSError, CheckpointError):
            self._write("error", text, host=host, rank=rank)
        self._lock.release()

    def __enter__(self) -> ExitRecord:
        for number in _SIGNALS:
            # A background job of a shell ignores Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._die)
        self._watch.open()
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
        # The job is ending: a second signal must not prevent the exit status.
        self._watch.close()
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        if self._later is not None:
            self._later.cancel()
        # A full disk must not replace the error that ends the job.
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
            before, self._interrupted = self._interrupted, time.monotonic()
            if self._interrupted - before < REPEAT_SECONDS:
                return
            raise KeyboardInterrupt
        if sys.exc_info()[0] is not None:
            # An error may be ending the job; the signal takes effect if the error is handled.
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
        """Write the file, unless this job has done so already or the folder is another job's."""
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
        """Yield True if this rank may write to the folder within the context."""
        assert self._folder is not None
        if self._lock.token:
            self._lock.verify(now=True)
            yield True
            return
        if self._token:  # rank 0 holds the lock, or was killed with it
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
            return True  # rank 0 has removed the last job's file
        if self._launch.world_size == 1:
            return False
        if self._launch.start_id:
            status = ExitStatus.decode(content)
            return status is not None and status.job == self._launch.start_id
        # Without a start id: a file written after this rank began is this job's, unless another job ran meanwhile.
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


class _SignalWatch:
    """Thread that notices signals whose Python handler is not run in time.

    A rendezvous, a collective or the start of a device waits in C++ for minutes. The Python handler runs only after
    that, and the process would be killed (Slurm: 30 s after SIGTERM) before it has reacted.

    Args:
        handler: the Python handler; a signal is watched while it is installed.
        on_unhandled: called from the thread with the signal number; it ends the process.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], None], on_unhandled: Callable[[int], None]) -> None:
        self._handler = handler
        self._on_unhandled = on_unhandled
        self._handled = 0.0
        self._pipe = (-1, -1)
        self._before = -1

    def handled(self) -> None:
        """Note that the handler runs; to be called by it."""
        self._handled = time.monotonic()

    def open(self) -> None:
        """Start the thread."""
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # The interpreter's own C handler writes the number of each signal there, whatever the main thread does.
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._run, args=(self._pipe[0],), name="signals", daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._before)
        os.close(self._pipe[1])

    def _run(self, source: int) -> None:
        while number := os.read(source, 1):
            received = time.monotonic()
            if signal.getsignal(number[0]) != self._handler:
                continue
            time.sleep(SIGNAL_PATIENCE)
            # The handler may have run a moment before this thread woke up.
            if self._handled < received - 1.0 and signal.getsignal(number[0]) == self._handler:
                self._on_unhandled(number[0])
        os.close(source)


def not_writable(save: Path, error: OSError) -> CheckpointError:
    """Return the error for a --save folder that cannot be created or written to."""
    return CheckpointError(
        f"Cannot write to --save {save}: {reason(error)}",
        fix=remedy(error, save, instead="give another --save", writing=True),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
