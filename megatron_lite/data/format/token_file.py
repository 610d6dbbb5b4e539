"""Range reader of a .bin token file.

It is read, not mapped: a page fault on a mapping reads far around its page, which at random places is a hundred times
the bytes wanted, and a file that is cut while it is mapped kills the process instead of raising an error.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import REBUILD
from megatron_lite.errors import DataError


class TokenFile:
    """An open .bin; it closes when nothing refers to it any more.

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
        """`count` tokens from byte `start` on, read-only, [count].

        Raises:
            DataError: the file cannot be read there, or no longer reaches so far.
        """
        num_bytes = count * self.dtype.itemsize
        try:
            found = os.pread(self._file, num_bytes, start)
            # One call gives at most 2 GiB.
            while len(found) < num_bytes and (more := os.pread(self._file, num_bytes - len(found), start + len(found))):
                found += more
        except OSError as error:
            raise DataError(
                "A dataset's tokens can be read",
                found=f"{self.path} at byte {start}: {error.strerror}",
                fix="See whether its file system still answers, then start again from the latest checkpoint",
            ) from error
        if len(found) < num_bytes:
            raise DataError(
                "A dataset stays whole while it is read",
                found=f"{self.path} ends at byte {start + len(found)}, it had {self.num_bytes} when it was opened",
                fix=REBUILD,
            )
        return np.frombuffer(found, dtype=self.dtype)
