"""In-kernel file copy, with reflinks where the file system supports them."""

from __future__ import annotations

import errno
import os
import shutil
from typing import BinaryIO

UNSUPPORTED = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM})
"""What copy_file_range answers where the kernel or file system cannot do it: copy through memory instead."""

CHUNK = 1 << 30


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Append bytes [0, count) of `source` at the position of `target`, whose buffer must be flushed.

    Raises:
        OSError: reading or writing failed, or `source` has fewer bytes.
    """
    copied = _copy_in_kernel(source.fileno(), target.fileno(), target.tell(), count)
    source.seek(copied)
    target.seek(0, os.SEEK_END)
    if copied < count:
        shutil.copyfileobj(_Limited(source, count - copied), target, 1 << 20)


def _copy_in_kernel(source: int, target: int, at: int, count: int) -> int:
    """Bytes that copy_file_range copied; it may stop early, and other systems than Linux lack it."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < count:
        try:
            step = os.copy_file_range(source, target, min(CHUNK, count - done), done, at + done)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return done
            raise
        if step == 0:
            return done
        done += step
    return done


class _Limited:
    """The next `count` bytes of a file, which must be there."""

    def __init__(self, file: BinaryIO, count: int) -> None:
        self.file = file
        self.left = count

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(min(size, self.left) if size >= 0 else self.left)
        if not data and self.left:
            raise OSError(errno.EIO, f"{self.left} bytes are missing at the end", self.file.name)
        self.left -= len(data)
        return data
