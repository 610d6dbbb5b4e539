"""Token file (.bin) access: random reads, and whole-file copies by copy_file_range."""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import REBUILD
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM})
"""Errors of copy_file_range where the kernel or file system does not support it."""

COPY_BYTES = 1 << 30
"""Bytes of one call of copy_file_range."""


class TokenFile:
    """An open .bin, closed when it is garbage-collected.

    The file is read with pread and is not mapped. A page fault of a mapping reads ahead, at random positions a hundred
    times the bytes that are needed; and a file that is truncated while it is mapped kills the process (SIGBUS) instead
    of raising an error.

    Args:
        path: the file.
        dtype: type of its tokens.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self.num_bytes = path.stat().st_size
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, start: int, count: int) -> NDArray[np.generic]:
        """Return `count` tokens from byte `start` as a read-only array, [count].

        Raises:
            DataError: the read fails, or the file has become shorter.
        """
        num_bytes = count * self.dtype.itemsize
        try:
            found = os.pread(self._file, num_bytes, start)
            # One call reads at most 2 GiB.
            while len(found) < num_bytes and (more := os.pread(self._file, num_bytes - len(found), start + len(found))):
                found += more
        except OSError as error:
            raise unreadable_tokens(f"{self.path} at byte {start}", error) from error
        if len(found) < num_bytes:
            raise DataError(
                f"{self.path} was truncated while it was read: it ends at byte {start + len(found):,} and had "
                f"{self.num_bytes:,} bytes when it was opened",
                rule="The likely cause is another process that is still writing it",
                fix=f"Let that process end, for example `megatron-lite preprocess` or a copy, and start this command "
                f"again. If there is none: {REBUILD[:1].lower()}{REBUILD[1:]}",
            )
        return np.frombuffer(found, dtype=self.dtype)


def unreadable_tokens(place: str, error: OSError) -> DataError:
    """Return the error for a token file that cannot be read at `place`."""
    return DataError(
        f"Cannot read {place}: {reason(error)}",
        fix=f"{remedy(error, place)}; then resume from the latest checkpoint (--load)",
    )


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Append bytes [0, count) of `source` to `target`, inside the kernel (or as a reflink) where that is supported.

    Args:
        source: file to read.
        target: file to write at its position; its buffer must be flushed.
        count: number of bytes.

    Raises:
        OSError: reading or writing failed, or `source` has fewer bytes.
    """
    copied, position = 0, target.tell()
    # copy_file_range may copy less than it is asked to, and exists on Linux only.
    while copied < count and hasattr(os, "copy_file_range"):
        try:
            size = min(COPY_BYTES, count - copied)
            step = os.copy_file_range(source.fileno(), target.fileno(), size, copied, position + copied)
        except OSError as error:
            if error.errno in NO_KERNEL_COPY:
                break
            raise
        if step == 0:
            break
        copied += step
    source.seek(copied)
    target.seek(0, os.SEEK_END)
    if copied < count:
        shutil.copyfileobj(_Limited(source, count - copied), target, 1 << 20)


class _Limited:
    """Reader of the next `count` bytes of a file; a shorter file is an error."""

    def __init__(self, file: BinaryIO, count: int) -> None:
        self.file = file
        self.left = count

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(min(size, self.left) if size >= 0 else self.left)
        if not data and self.left:
            raise OSError(errno.EIO, f"{self.left} bytes are missing at the end", self.file.name)
        self.left -= len(data)
        return data
