"""Advisory file lock between processes: one writer of a dataset or of a cached index at a time."""

from __future__ import annotations

import errno
import fcntl
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
