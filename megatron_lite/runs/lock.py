"""Lock on a --save folder: one job at a time writes there, also across hosts and on network file systems.

The lock is the folder `job.lock` with exactly one file in it. The file's name is the owner's token and the number of
its last heartbeat, its content describes the owner. Every change is one rename on the file server, so the lock needs
neither flock (which Lustre and NFS may lack) nor synchronized clocks:

- A free lock is taken by renaming a prepared folder to `job.lock`, which fails if that exists and is not empty.
- A heartbeat renames the file to the next number.
- A stale lock is taken over by renaming the file from the name last seen to the new owner's. Of several jobs that try,
  one succeeds; none does if the owner has sent a heartbeat in the meantime.
- An owner whose file is gone has lost the lock, and stops.
- To release it, the owner removes its own file, whose name is unique.

A lock is stale if its owner's process has ended (visible on the same machine only), if it belongs to an earlier start
of the same Slurm job, or if its heartbeat does not change for PATIENCE intervals of the observer's clock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.lock_file import LOCK_NAME, PATIENCE, Owner, SeenLock, read_lock_file
from megatron_lite.runs.process import ProcessId, is_running, is_stopped

HEARTBEAT_SECONDS = 15.0
POLL_SECONDS = 0.5
"""Seconds between two reads of a lock that may be stale."""


_RULE = "One job at a time may write to such a folder"


class FolderLock:
    """Lock on one folder, held by this process with heartbeats.

    Args:
        folder: the --save folder; created when the lock is taken.
        process: this process.
        command: the command that this process runs, for messages.
        notify: receives a line about waiting, and about a stale lock that is taken over.
        clock: seconds, from any origin; injected by tests.
        name: of the lock in the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        process: ProcessId,
        command: str,
        notify: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        name: str = LOCK_NAME,
    ) -> None:
        self.folder = folder
        self._path = folder / name
        self._process = process
        self._command = command
        self._notify = notify
        self._clock = clock
        self._first: tuple[SeenLock, float] | None = None
        self._notified = ""
        self._name = ""
        self._last_beat = 0.0
        self._lost = False
        self._mutex = threading.Lock()
        self._over = threading.Event()

    @property
    def token(self) -> str:
        """Identifier of this acquisition; empty: the lock is not held."""
        return self._name.partition(".")[0]

    def acquire(self) -> None:
        """Take the lock, after waiting to find out if the lock of another machine is stale.

        Raises:
            CheckpointError: another job holds it.
            OSError: the folder cannot be written to.
        """
        while not self.attempt():
            time.sleep(POLL_SECONDS)

    def attempt(self) -> bool:
        """Read the lock once, and take it if it is free or stale.

        Returns:
            True: the lock is held now. False: undecided, to be repeated after POLL_SECONDS.

        Raises:
            CheckpointError, OSError: as acquire.
        """
        seen = read_lock_file(self._path)
        if seen is None:
            return self._take_free()
        now = self._clock()
        if self._first is None or self._first[0].token != seen.token:
            self._first = seen, now
            return self._is_stale(seen) and self._take_over(seen)
        first, since = self._first
        if seen.name != first.name or (seen.owner is not None and is_running(seen.owner.process)):
            raise self._refusal(seen)
        patience = PATIENCE * (seen.owner.heartbeat_seconds if seen.owner is not None else HEARTBEAT_SECONDS)
        if now - since >= patience:
            return self._take_over(seen)
        if self._notified != seen.token:
            self._notified = seen.token
            self._notify(f"{self.folder} is locked by {seen}: waiting up to {patience:.0f} s for its next heartbeat")
        return False

    def try_acquire(self) -> bool:
        """Take the lock if that needs no waiting; return True if it is held now.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._first = None
        for _ in range(2):
            with contextlib.suppress(CheckpointError):
                if self.attempt():
                    return True
        return False

    def verify(self, *, now: bool = False) -> None:
        """Verify that this process still holds the lock, by the result of its last heartbeat if that is recent.

        Args:
            now: send a heartbeat in any case.

        Raises:
            CheckpointError: the lock was taken over or removed; this process must not write to the folder any more.
        """
        overdue = self._clock() - self._last_beat > 2 * HEARTBEAT_SECONDS
        if (now or overdue) and not self._lost:
            with self._mutex:
                if self._name:
                    self._beat()
        if not self._lost:
            return
        seen = read_lock_file(self._path)
        who = f"{seen} holds it now" if seen is not None else "the file was removed"
        raise CheckpointError(
            f"This job has lost the lock {self._path}: {who}",
            rule=f"A job loses its lock if it is paused for longer than {PATIENCE * HEARTBEAT_SECONDS:.0f} s, or if "
            "its folder is "
            "moved or emptied",
            fix="This job stops without writing to the folder. If no other job trains there, run the same command "
            "again: it "
            "resumes from the latest checkpoint",
        )

    def release(self) -> None:
        """Release the lock; without effect if it is not held."""
        self._over.set()
        with self._mutex:
            name, self._name = self._name, ""
            if not name or self._lost:
                return
            # A file system that fails now leaves a lock whose process has ended: it is stale.
            with contextlib.suppress(OSError):
                (self._path / name).unlink()
                self._path.rmdir()

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _owner(self, token: str) -> Owner:
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Owner(
            token=token,
            process=self._process,
            command=self._command,
            since=since,
            heartbeat_seconds=HEARTBEAT_SECONDS,
        )

    def _is_stale(self, seen: SeenLock) -> bool:
        """Return True if a single read shows that a lock is stale."""
        if seen.owner is None:
            return False
        theirs, ours = seen.owner.process, self._process
        if theirs.slurm_job and theirs.slurm_job == ours.slurm_job and theirs.slurm_restarts < ours.slurm_restarts:
            return True  # Slurm ends a start of a job before the next one
        return is_running(theirs) is False

    def _take_free(self) -> bool:
        token = secrets.token_hex(8)
        name = f"{token}.{int(time.time())}"
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(f"{self._path.name}.{token}")
        try:
            aside.mkdir()
            _write(aside / name, self._owner(token).encode(), os.O_CREAT | os.O_EXCL)
            with contextlib.suppress(OSError):
                self._path.rmdir()  # some file systems do not rename to a folder that exists, even an empty one
            aside.rename(self._path)
        except OSError as error:
            # NFS may report an error although the rename was done.
            if not (self._path / name).exists():
                shutil.rmtree(aside, ignore_errors=True)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    return False  # another process took it first
                raise
        return self._begin(name)

    def _take_over(self, seen: SeenLock) -> bool:
        token = secrets.token_hex(8)
        name = f"{token}.{max(seen.beat + 1, int(time.time()))}"
        try:
            (self._path / seen.name).rename(self._path / name)
        except FileNotFoundError:
            if not (self._path / name).exists():
                self._first = None
                return False  # the owner has sent a heartbeat, or another process took it first
        # Not created if it is gone: the lock never has two files.
        with contextlib.suppress(FileNotFoundError):
            _write(self._path / name, self._owner(token).encode(), os.O_TRUNC)
            self._notify(f"taking over the lock of {self.folder}, left behind by {seen}")
        return self._begin(name)

    def _begin(self, name: str) -> bool:
        """Verify the lock that was just taken, and start to send heartbeats."""
        seen = read_lock_file(self._path)
        if seen is None or seen.name != name:
            return False
        for left_behind in self.folder.glob(f"{self._path.name}.*"):
            shutil.rmtree(left_behind, ignore_errors=True)  # a process died between preparing and taking
        self._name, self._lost, self._last_beat = name, False, self._clock()
        self._over = threading.Event()
        threading.Thread(target=self._run, args=(self._over,), name="lock-heartbeat", daemon=True).start()
        return True

    def _run(self, over: threading.Event) -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with self._mutex:
                if not self._name or self._lost or over.is_set():
                    return
                self._beat()

    def _beat(self) -> None:
        """Send a heartbeat, which detects if the lock was lost."""
        token, _, beat = self._name.partition(".")
        # The time, for readers of the folder; the only requirement is that it differs from the last.
        name = f"{token}.{max(int(beat) + 1, int(time.time()))}"
        try:
            (self._path / self._name).rename(self._path / name)
        except FileNotFoundError:
            if not (self._path / name).exists():
                self._lost = True
                return
        except OSError:
            return  # the file server is unavailable or full; the next heartbeat tries again
        self._name, self._last_beat = name, self._clock()

    def _refusal(self, seen: SeenLock) -> CheckpointError:
        stopped = seen.owner is not None and is_running(seen.owner.process) and is_stopped(seen.owner.process)
        paused = ""
        if stopped and seen.owner is not None:
            paused = f" That process is suspended (SIGSTOP): `kill -CONT {seen.owner.process.pid}` continues it."
        return CheckpointError(
            f"{self.folder} is in use by {seen}", rule=_RULE, fix=f"{seen.remedy}.{paused} Nothing was written"
        )


def _write(path: Path, content: bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | flags, 0o666)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
