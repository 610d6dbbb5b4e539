"""Token file (.bin) access: random reads, and copies of whole files."""

from __future__ import annotations

import errno
import os
import weakref
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import REBUILD
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

COPY_BYTES = 1 << 18
"""Bytes of the buffer of a copy."""


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


def copy_bytes(source: FileIO, target: BinaryIO, count: int) -> None:
    """Write bytes [0, count) of `source` to `target`.

    A small buffer stays in the processor's cache, and takes half the time of copy_file_range on ext4.

    Raises:
        OSError: reading or writing failed, or `source` has fewer bytes.
    """
    buffer, left = memoryview(bytearray(COPY_BYTES)), count
    while left:
        size = source.readinto(buffer[: min(left, COPY_BYTES)])
        if not size:
            raise OSError(errno.EIO, f"{left} bytes are missing at the end", source.name)
        target.write(buffer[:size])
        left -= size
