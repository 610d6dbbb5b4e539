"""Advisory file lock between processes: one writer of a dataset or of a cached index at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO, Any

UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""Errors of file systems without locks (Lustre, unless it is mounted with -o flock)."""


def acquire(file: IO[Any], *, wait: bool) -> bool:
    """Lock `file` until it is closed or the process ends; on a file system without locks, every process gets it.

    Args:
        file: any open file.
        wait: wait until another process has released the lock.

    Returns:
        False if another process holds the lock (without `wait` only).

    Raises:
        OSError: the lock fails for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True


def holder(file: IO[Any]) -> tuple[str, str]:
    """Return which process holds the lock of `file`, and how to end it, for errors.

    The kernel lists the locks of this host only (proc_locks(5)), and with pid 0 those of other containers.
    """
    status = os.fstat(file.fileno())
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        fields = line.split()
        if fields[1:2] == ["FLOCK"] and fields[5] == inode and int(fields[4]) > 0:
            return f"process {fields[4]} on {socket.gethostname()}", f"`kill {fields[4]}`"
    return "a process on another host or in another container", "kill or scancel there"
