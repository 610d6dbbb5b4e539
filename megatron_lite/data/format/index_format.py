"""The .idx file format of Megatron's memory-mapped datasets: header layout and header checks.

Layout, little-endian: magic, u64 version, u8 token type, u64 N sequences, u64 D entries of the document index, then
int32 lengths[N] in tokens, int64 pointers[N] in bytes into the .bin, int64 document_index[D] in sequences (it starts
with 0 and ends with N), and for multimodal datasets int8 modes[N].
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.config.paths import suggest_dataset
from megatron_lite.errors import DataError

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
"""Type codes that hold tokens. 6 and 7 are floats of a meaning that differs between generations."""


def smallest_token_type(vocab_size: int) -> np.dtype:
    """The type that both generations of Megatron choose for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def type_code(dtype: np.dtype) -> int:
    """Code of a token type in the header.

    Raises:
        DataError: the type is not one that the format can hold.
    """
    for code, known in TOKEN_TYPES.items():
        if known == dtype:
            return code
    known_names = ", ".join(known.name for known in TOKEN_TYPES.values())
    raise DataError("Tokens are stored as an integer type of the format", found=f"{dtype}", fix=f"Use {known_names}")


def pack_header(dtype: np.dtype, num_sequences: int, num_document_entries: int) -> bytes:
    """The 34 bytes before the arrays."""
    return HEADER.pack(MAGIC, VERSION, type_code(dtype), num_sequences, num_document_entries)


def bin_path(prefix: str | Path) -> Path:
    """Path of the tokens of the dataset `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index of the dataset `prefix`."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class IndexHeader:
    """The fields of an .idx header, and where they put the arrays."""

    dtype: np.dtype
    num_sequences: int
    num_document_entries: int

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
        """Bytes of the whole file (without modes)."""
        return self.documents_at + 8 * self.num_document_entries


def read_header(prefix: str | Path) -> IndexHeader:
    """Read and check the header of `prefix`.idx.

    Raises:
        DataError: a file of the pair is missing, or the header is not one of a text dataset of a matching size.
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
            "A dataset's index must be readable",
            found=f"{path}: {error}",
            fix=f"Make it readable, as with chmod u+r {path}",
        ) from error
    check_magic(path, head)
    _, version, code, num_sequences, num_document_entries = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"A dataset's index has version {VERSION}", found=f"{path} has version {version}", fix=REBUILD)
    if code not in TOKEN_TYPES:
        raise DataError(
            f"A dataset's token type code is one of {sorted(TOKEN_TYPES)}", found=f"{path} has code {code}", fix=REBUILD
        )
    header = IndexHeader(TOKEN_TYPES[code], num_sequences, num_document_entries)
    check_size(path, header)
    return header


REBUILD = "Preprocess the corpus again, or copy both files again from where they are whole"


def check_magic(path: Path, head: bytes) -> None:
    """Refuse what is not an .idx file, each kind with its own remedy."""
    if head.startswith(LEGACY_MAGIC):
        raise DataError(
            "A dataset's index must be of the memory-mapped kind",
            found=f"{path} is of the older lazy/cached kind (TNTIDX)",
            fix="Convert it once with `megatron-lite data convert OLD_PREFIX NEW_PREFIX`",
        )
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise DataError(
            "A dataset's index starts with MMIDIDX",
            found=f"{path} starts with {head[: len(MAGIC)]!r}",
            fix="--data-path takes the common prefix of a .bin/.idx pair written by tools/preprocess_data.py",
        )
    if len(head) < HEADER.size:
        raise DataError(
            f"A dataset's index has a header of {HEADER.size} bytes",
            found=f"{path} ends after {len(head)} bytes",
            fix=REBUILD,
        )


def check_size(path: Path, header: IndexHeader) -> None:
    """Refuse an index that is longer or shorter than its own header says."""
    actual = path.stat().st_size
    if actual == header.size + header.num_sequences != header.size:
        raise DataError(
            "A dataset holds text only",
            found=f"{path} has the modes of a multimodal dataset",
            fix="Preprocess the text alone",
        )
    if actual != header.size:
        raise DataError(
            "A dataset's index is as long as its header says",
            found=f"{path} has {actual} bytes, {header.num_sequences} sequences and {header.num_document_entries} "
            f"document entries need {header.size}",
            fix=REBUILD,
        )
    if header.num_document_entries < 1:
        raise DataError("A dataset's document index has at least one entry", found=f"{path} has none", fix=REBUILD)


def missing_file(prefix: str | Path, missing: Path) -> DataError:
    """The error for a missing .bin or .idx, with the nearest prefix that exists."""
    name = str(prefix)
    if Path(name).is_dir():
        return DataError(
            "A dataset is given by the common prefix of its .bin and .idx",
            found=f"{name} is a folder",
            fix=suggest_dataset(name),
        )
    return DataError("Both files of a dataset must exist", found=f"{missing} does not", fix=suggest_dataset(name))
