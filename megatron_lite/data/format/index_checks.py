"""Consistency checks of an .idx file against its .bin, chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import REBUILD, bin_path, idx_path
from megatron_lite.errors import DataError

CHUNK = 1 << 20


def damaged(prefix: str | Path, what: str) -> DataError:
    """The error for an index that contradicts itself or its .bin."""
    return DataError("A dataset's index must fit its tokens", found=f"{idx_path(prefix)}: {what}", fix=REBUILD)


def check_ends(
    prefix: str,
    sizes: NDArray[np.int32],
    pointers: NDArray[np.int64],
    documents: NDArray[np.int64],
    itemsize: int,
    num_bytes: int,
) -> None:
    """The checks whose cost does not depend on the number of sequences: both ends of every array.

    Raises:
        DataError: they do not fit `num_bytes` of tokens.
    """
    count = sizes.shape[0]
    if documents[0] != 0 or documents[-1] != count:
        raise damaged(
            prefix, f"its documents reach from sequence {documents[0]} to {documents[-1]}, there are {count} sequences"
        )
    if count and pointers[0] != 0:
        raise damaged(prefix, f"the first sequence begins at byte {pointers[0]}")
    needed = int(pointers[-1]) + int(sizes[-1]) * itemsize if count else 0
    if needed != num_bytes:
        raise DataError(
            "A dataset's .bin is as long as its .idx says",
            found=f"{bin_path(prefix)} has {num_bytes} bytes, its .idx describes {needed}",
            fix=REBUILD,
        )


def check_pointers(
    prefix: str,
    sizes: NDArray[np.int32],
    pointers: NDArray[np.int64],
    itemsize: int,
    num_bytes: int,
    start: int,
    end: int,
) -> None:
    """Check sequences [start, end): no negative length, and each begins where the one before it ends.

    Raises:
        DataError: they do not.
    """
    for low in range(start, end, CHUNK):
        high = min(end, low + CHUNK)
        lengths = sizes[low:high].astype(np.int64)
        if lengths.min() < 0:
            raise damaged(prefix, f"sequence {low + int(np.argmin(lengths))} has {lengths.min()} tokens")
        begins = pointers[low : high + 1].astype(np.int64)
        ends = begins[: high - low] + lengths * itemsize
        if begins[0] < 0 or ends[-1] > num_bytes:
            raise damaged(prefix, f"sequences {low} to {high} lie in bytes {begins[0]} to {ends[-1]} of {num_bytes}")
        wrong = np.flatnonzero(ends[: begins.shape[0] - 1] != begins[1:])
        if wrong.size:
            at = int(wrong[0])
            raise damaged(prefix, f"sequence {low + at} ends at byte {ends[at]}, the next begins at {begins[at + 1]}")


def check_documents(prefix: str, documents: NDArray[np.int64]) -> None:
    """Check that document boundaries never go back.

    Raises:
        DataError: they do.
    """
    for low in range(0, documents.shape[0] - 1, CHUNK):
        part = documents[low : low + CHUNK + 1]
        wrong = np.flatnonzero(part[1:] < part[:-1])
        if wrong.size:
            raise damaged(prefix, f"document {low + int(wrong[0])} ends before it begins")
