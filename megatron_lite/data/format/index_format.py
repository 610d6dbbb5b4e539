"""The .idx file format of Megatron's memory-mapped datasets: header layout and consistency checks.

Layout, little-endian: magic, u64 version, u8 token type, u64 N sequences, u64 D entries of the document index, then
int32 lengths[N] in tokens, int64 pointers[N] in bytes into the .bin, int64 document_index[D] in sequences (0 to N), and
for multimodal datasets int8 modes[N].
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.config.paths import suggest_dataset
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

TOKEN_TYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Token types by code. Codes 6 and 7 are floats, which differ between the generations of Megatron."""

CHUNK = 1 << 20
"""Sequences checked at a time, which bounds temporary arrays."""

REBUILD = "Copy the .bin and .idx files again from an intact copy, or preprocess the corpus again"


def smallest_token_type(vocab_size: int) -> np.dtype:
    """Return the type that both generations of Megatron choose for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def type_code(dtype: np.dtype) -> int:
    """Return the code of a token type in the header.

    Raises:
        DataError: the format has no code for the type.
    """
    for code, known in TOKEN_TYPES.items():
        if known == dtype:
            return code
    names = ", ".join(known.name for known in TOKEN_TYPES.values())
    raise DataError(f"Cannot store tokens of type {dtype}", fix=f"Use one of these types: {names}")


def pack_header(dtype: np.dtype, num_sequences: int, num_document_entries: int) -> bytes:
    """Return the 34 bytes before the arrays."""
    return HEADER.pack(MAGIC, VERSION, type_code(dtype), num_sequences, num_document_entries)


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the token file of the dataset `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the index of the dataset `prefix`."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class IndexHeader:
    """Fields of an .idx header, and the offsets of the arrays after it."""

    dtype: np.dtype
    num_sequences: int
    num_document_entries: int

    sizes_at = HEADER.size
    """Byte offset of the lengths."""

    @property
    def pointers_at(self) -> int:
        """Byte offset of the pointers."""
        return HEADER.size + 4 * self.num_sequences

    @property
    def documents_at(self) -> int:
        """Byte offset of the document index."""
        return HEADER.size + 12 * self.num_sequences

    @property
    def size(self) -> int:
        """Size of the file in bytes (without modes)."""
        return self.documents_at + 8 * self.num_document_entries


def read_header(prefix: str | Path) -> IndexHeader:
    """Read and check the header of `prefix`.idx.

    Raises:
        DataError: a file of the pair is missing, the header is not that of a text dataset, or the file's size differs
            from the header.
    """
    path = idx_path(prefix)
    for missing in (path, bin_path(prefix)):
        if not missing.is_file():
            raise missing_file(prefix, missing)
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {reason(error)}", fix=remedy(error, path, instead="give another dataset")
        ) from error
    _check_magic(path, head)
    _, version, code, num_sequences, num_document_entries = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(
            f"{path} has format version {version} in its header; only version {VERSION} exists",
            fix=REBUILD,
        )
    if code not in TOKEN_TYPES:
        raise DataError(
            f"{path} has the unknown token type {code} in its header (known: "
            f"{', '.join(map(str, sorted(TOKEN_TYPES)))})",
            fix=REBUILD,
        )
    header = IndexHeader(TOKEN_TYPES[code], num_sequences, num_document_entries)
    actual = path.stat().st_size
    if actual == header.size + num_sequences != header.size:
        raise DataError(
            f"{path} is the index of a multimodal dataset; only text datasets can be read",
            fix="Preprocess the text of the corpus alone with `megatron-lite preprocess`",
        )
    if actual != header.size:
        raise DataError(
            f"{path} is truncated or damaged: it has {actual:,} bytes, but by its header ({num_sequences:,} sequences, "
            f"{num_document_entries:,} document entries) it needs {header.size:,}",
            fix=REBUILD,
        )
    if num_document_entries < 1:
        raise DataError(f"{path} is damaged: its header states 0 document entries", fix=REBUILD)
    return header


def _check_magic(path: Path, head: bytes) -> None:
    if head.startswith(LEGACY_MAGIC):
        raise DataError(
            f"{path} has the older format of Megatron's --data-impl lazy or cached (TNTIDX), which training does not "
            "read",
            fix="Convert it once with `megatron-lite data convert OLD_PREFIX NEW_PREFIX`",
        )
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise DataError(
            f"{path} is not the index of a dataset: it begins with the bytes {head[: len(MAGIC)]!r} instead of MMIDIDX",
            fix="Give the common prefix of a .bin and an .idx file that `megatron-lite preprocess` wrote",
        )
    if len(head) < HEADER.size:
        raise DataError(
            f"{path} is truncated: it has {len(head)} bytes, its header alone needs {HEADER.size}", fix=REBUILD
        )


def missing_file(prefix: str | Path, missing: Path) -> DataError:
    """Return the error for a missing .bin or .idx, with the nearest prefix that exists."""
    name = str(prefix)
    if Path(name).is_dir():
        return DataError(
            f"{name} is a folder, not the common prefix of a .bin and an .idx file", fix=suggest_dataset(name)
        )
    return DataError(f"{missing} does not exist", fix=suggest_dataset(name))


def damaged_index(prefix: str | Path, problem: str) -> DataError:
    """Return the error for an index that contradicts itself or its .bin."""
    return DataError(f"{idx_path(prefix)} is damaged: {problem}", fix=REBUILD)


def check_ends(
    prefix: str,
    sizes: NDArray[np.int32],
    pointers: NDArray[np.int64],
    documents: NDArray[np.int64],
    itemsize: int,
    num_bytes: int,
) -> None:
    """Check both ends of every array of an index, which takes constant time.

    Args:
        prefix: path of the dataset.
        sizes: [sequences] lengths in tokens.
        pointers: [sequences] offsets in bytes.
        documents: [documents + 1] first sequence of each document.
        itemsize: bytes of a token.
        num_bytes: size of the .bin.

    Raises:
        DataError: the arrays do not match `num_bytes` of tokens.
    """
    count = sizes.shape[0]
    if documents[0] != 0 or documents[-1] != count:
        raise damaged_index(
            prefix, f"its documents span sequences {documents[0]} to {documents[-1]}, there are {count} sequences"
        )
    if count and pointers[0] != 0:
        raise damaged_index(prefix, f"the first sequence begins at byte {pointers[0]}")
    needed = int(pointers[-1]) + int(sizes[-1]) * itemsize if count else 0
    if needed != num_bytes:
        raise DataError(
            f"{bin_path(prefix)} and its .idx do not belong together, or one is truncated: the .bin has {num_bytes:,} "
            "bytes, "
            f"the .idx describes {needed:,}",
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
    """Check sequences [start, end): no negative length, and each begins at the end of the one before it.

    Raises:
        DataError: the index is damaged.
    """
    for low in range(start, end, CHUNK):
        high = min(end, low + CHUNK)
        check_block(prefix, sizes[low:high], pointers[low : high + 1], itemsize, num_bytes, low)


def check_block(
    prefix: str, sizes: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int, num_bytes: int, first: int
) -> None:
    """Check consecutive sequences as check_pointers does.

    Args:
        prefix: path of the dataset.
        sizes: [sequences] lengths in tokens.
        pointers: [sequences] offsets in bytes, followed by the next sequence's if there is one.
        itemsize: bytes of a token.
        num_bytes: size of the .bin.
        first: number of the first sequence.

    Raises:
        DataError: the index is damaged.
    """
    lengths, begins = sizes.astype(np.int64), pointers.astype(np.int64)
    if lengths.min() < 0:
        raise damaged_index(prefix, f"sequence {first + int(np.argmin(lengths))} has {lengths.min()} tokens")
    ends = begins[: lengths.shape[0]] + lengths * itemsize
    if begins[0] < 0 or ends[-1] > num_bytes:
        last = first + lengths.shape[0]
        raise damaged_index(
            prefix,
            f"it places sequences {first} to {last} at bytes {begins[0]:,} to {ends[-1]:,}, and the .bin has "
            f"{num_bytes:,}",
        )
    wrong = np.flatnonzero(ends[: begins.shape[0] - 1] != begins[1:])
    if wrong.size:
        at = int(wrong[0])
        raise damaged_index(
            prefix, f"sequence {first + at} ends at byte {ends[at]}, the next begins at {begins[at + 1]}"
        )


def check_documents(prefix: str, documents: NDArray[np.int64]) -> None:
    """Check that document boundaries do not decrease.

    Raises:
        DataError: the index is damaged.
    """
    for low in range(0, documents.shape[0] - 1, CHUNK):
        part = documents[low : low + CHUNK + 1]
        wrong = np.flatnonzero(part[1:] < part[:-1])
        if wrong.size:
            raise damaged_index(prefix, f"document {low + int(wrong[0])} ends before it begins")
