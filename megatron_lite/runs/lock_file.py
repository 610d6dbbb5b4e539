"""Lock file of a folder: its format (owner, heartbeat), and reading it without acquiring the lock."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_lite.runs.process import ProcessId, is_running

LOCK_NAME = "job.lock"
PATIENCE = 3
"""Heartbeat intervals without a change after which the lock of another machine is stale."""
_READ_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Owner of a lock.

    Attributes:
        token: random identifier of this acquisition.
        process: the process that holds the lock.
        command: the command that it runs, for messages.
        since: when it took the lock, UTC by its own clock, ISO 8601.
        heartbeat_seconds: its heartbeat interval.
    """

    token: str
    process: ProcessId
    command: str
    since: str
    heartbeat_seconds: float

    def __str__(self) -> str:
        return f"{self.process} ({self.command}, since {self.since})"

    @property
    def how_to_end(self) -> str:
        """The command that ends the process."""
        process = self.process
        return f"`scancel {process.slurm_job}`" if process.slurm_job else f"`kill {process.pid}` on {process.host}"

    def encode(self) -> bytes:
        """Return the content of the lock's file."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> Owner | None:
        """Inverse of encode; None: the content is incomplete, or of another version."""
        try:
            values = json.loads(content)
            return cls(**{**values, "process": ProcessId(**values["process"])})
        except (ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class SeenLock:
    """A lock as read from the disk; `owner` is None during a change of owner, or if the content is damaged."""

    name: str
    owner: Owner | None

    @property
    def token(self) -> str:
        """Return the identifier of the acquisition."""
        return self.name.partition(".")[0]

    @property
    def beat(self) -> int:
        """Return the number of the last heartbeat: its time in seconds since 1970, by the owner's clock."""
        number = self.name.partition(".")[2]
        return int(number) if number.isdecimal() else 0

    @property
    def remedy(self) -> str:
        """How to get a folder that another process holds, for the fix of an error."""
        if self.owner is None:
            return "Wait until that job has ended, or use another folder"
        expiry = PATIENCE * self.owner.heartbeat_seconds
        return (
            f"Wait until that process has ended (the lock of a killed one expires after {expiry:.0f} s), end it "
            f"({self.owner.how_to_end}), or use another folder"
        )

    def __str__(self) -> str:
        if self.owner is None:
            return f"a job that cannot be identified ({self.name})"
        beat = datetime.fromtimestamp(self.beat, timezone.utc).isoformat(timespec="seconds")
        return f"{self.owner}, last heartbeat {beat}"


@dataclass(frozen=True)
class LockState:
    """A lock, as a process sees it that does not take part.

    Attributes:
        owner: who holds it.
        heartbeat: time of the last heartbeat by the owner's clock, in seconds since 1970.
    """

    owner: Owner
    heartbeat: int

    def is_held(self, now: float) -> bool:
        """Return whether the owner seems to run: by its process on this machine, else by its last heartbeat.

        Args:
            now: seconds since 1970. Clocks of machines differ, so that twice the PATIENCE is allowed.
        """
        running = is_running(self.owner.process)
        return now - self.heartbeat <= 2 * PATIENCE * self.owner.heartbeat_seconds if running is None else running


def read_lock(folder: Path) -> LockState | None:
    """Return a folder's lock, stale or not; None: it is free, or changes its owner now."""
    try:
        seen = read_lock_file(folder / LOCK_NAME)
    except OSError:
        return None
    return LockState(seen.owner, seen.beat) if seen is not None and seen.owner is not None else None


def read_owner(folder: Path) -> Owner | None:
    """Return the owner of a folder's lock, stale or not; None: it is free, or changes its owner now."""
    lock = read_lock(folder)
    return None if lock is None else lock.owner


def read_lock_file(path: Path) -> SeenLock | None:
    """Read a lock; None: it is free.

    Raises:
        OSError: it cannot be read.
    """
    seen = None
    for _ in range(_READ_ATTEMPTS):
        names = _files(path)
        if names is None:
            return None
        # A heartbeat between listing and reading gives the file another name, and a listing may miss it altogether.
        with contextlib.suppress(FileNotFoundError):
            for name in names[:1]:
                owner = Owner.decode((path / name).read_bytes())
                seen = SeenLock(name, owner if owner is not None and owner.token == name.partition(".")[0] else None)
        if seen is not None and seen.owner is not None:
            return seen
        time.sleep(0.02)
    return seen


def _files(path: Path) -> list[str] | None:
    """Return the files of a lock: one, or none while it is taken or released; None: there is no lock."""
    try:
        # NFS keeps removed files that are open under names that start with a dot.
        return [name for name in (entry.name for entry in path.iterdir()) if not name.startswith(".")]
    except FileNotFoundError:
        return None
