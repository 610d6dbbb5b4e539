"""Advisory file lock that prevents two commands from writing the same dataset."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK})
"""What a file system without locks answers (Lustre, unless it is mounted with -o flock)."""


def try_lock(file: IO[Any]) -> bool:
    """Lock `file` without waiting; False if another process holds it. Without locks on that file system, all do.

    Raises:
        OSError: the lock fails for another reason.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True
