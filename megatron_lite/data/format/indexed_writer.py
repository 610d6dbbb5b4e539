"""Writer of Megatron's memory-mapped .bin/.idx datasets, with constant memory."""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_lite.data.format.file_lock import acquire, holder
from megatron_lite.data.format.index_format import (
    CHUNK,
    bin_path,
    idx_path,
    pack_header,
    type_code,
)
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.token_file import copy_bytes
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

BUFFERED = 4096
"""Lengths, or document boundaries, kept in memory before they are written to their temporary file."""


class Extent(NamedTuple):
    """Content of a dataset so far."""

    sequences: int = 0
    documents: int = 0
    tokens: int = 0


class IndexedDatasetWriter:
    """Writer of a .bin/.idx pair under temporary names; `finish` renames both, the .idx last.

    Memory use is constant: lengths and document boundaries are written to temporary files, from which `finish` builds
    the .idx. As a context manager, the writer finishes on success and removes its files if the block raises.

    Args:
        prefix: path of both files without the suffix.
        dtype: type of the stored tokens (index_format.smallest_token_type is Megatron's choice).
        unfinished: path of the temporary files without suffix, if they are kept when writing is interrupted; empty:
            they are next to the dataset and removed.
        extent: content of the temporary files to append to; the rest of the files is removed.
        synced: `finish` waits until the files are on the disk.

    Attributes:
        index_piece: bytes and CRC-32 of the .idx, when the writer is finished.

    Raises:
        DataError: the folder cannot be written to, the disk is full, another process writes to the same name, a token
            does not fit `dtype`, or the temporary files have less content than `extent`.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: np.dtype | type[np.integer],
        unfinished: str | Path = "",
        extent: Extent | None = None,
        *,
        synced: bool = True,
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        type_code(self.dtype)
        self.num_sequences, self.num_documents, self.num_tokens = extent or Extent()
        self.index_piece = (0, 0)
        self._is_kept = bool(unfinished)
        self._synced = synced
        self._sizes = array("i")
        self._documents = array("q") if extent else array("q", [0])
        self._paths = {
            part: Path(f"{unfinished or prefix}.{part}.tmp") for part in ("bin", "idx", "sizes", "documents")
        }
        with self._writing():
            self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
            self._files: dict[str, BinaryIO] = {"bin": _open_exclusively(self._paths["bin"], self.prefix)}
            for part in ("sizes", "documents"):
                self._files[part] = _open(self._paths[part])
            kept = {"sizes": 4 * self.num_sequences, "documents": 8 * (self.num_documents + 1) if extent else 0}
            for part, size in {"bin": self.num_bytes, **kept}.items():
                self._cut(part, size)

    def _cut(self, part: str, size: int) -> None:
        """Remove what follows `size` bytes of a temporary file, and continue there."""
        file = self._files[part]
        found = os.fstat(file.fileno()).st_size
        if found < size:
            self.abort()
            raise DataError(
                f"Cannot continue {self._paths[part]}: it has {found:,} bytes of the {size:,} that were written before "
                "the interruption",
                fix=f'Delete the folder "{self._paths[part].parent}" and give the same command again',
            )
        if found > size:  # ext4 writes a file that was truncated to the disk when it is closed
            file.truncate(size)
        file.seek(size)

    @property
    def extent(self) -> Extent:
        """Content so far."""
        return Extent(self.num_sequences, self.num_documents, self.num_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of the .bin so far."""
        return self.num_tokens * self.dtype.itemsize

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append one sequence, [tokens], to the current document; `end_document` ends it."""
        stored = self._to_stored(tokens)
        with self._writing():
            self._files["bin"].write(stored.data)
        self._sizes.append(stored.shape[0])
        self.num_sequences += 1
        self.num_tokens += stored.shape[0]
        if len(self._sizes) >= BUFFERED:
            self._spill()

    def end_document(self) -> None:
        """End the current document; a document without sequences is kept as an empty one, as in Megatron-LM."""
        self._documents.append(self.num_sequences)
        self.num_documents += 1
        if len(self._documents) >= BUFFERED:
            self._spill()

    def add_document(self, tokens: ArrayLike) -> None:
        """Append a document of one sequence, [tokens]; without tokens, an empty document."""
        stored = self._to_stored(tokens)
        if stored.shape[0]:
            self.add_sequence(stored)
        self.end_document()

    def add_batch(
        self, tokens: NDArray[np.generic], lengths: NDArray[np.int64], sequences: NDArray[np.int64], checksum: int = 0
    ) -> int:
        """Append several documents.

        Args:
            tokens: [tokens] concatenated tokens of all sequences.
            lengths: [sequences] tokens of each sequence.
            sequences: [documents] sequences of each document, 0 for an empty one.
            checksum: CRC-32 of the bytes before.

        Returns:
            CRC-32 of the bytes before and of the stored tokens.
        """
        stored = self._to_stored(tokens)
        with self._writing():
            self._files["bin"].write(stored.data)
        self._sizes.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.frombytes((self.num_sequences + np.cumsum(sequences)).astype(np.int64).tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(sequences)
        self.num_tokens += len(stored)
        if len(self._sizes) >= BUFFERED or len(self._documents) >= BUFFERED:
            self._spill()
        return zlib.crc32(stored.data, checksum)

    def append(self, prefix: str | Path) -> None:
        """Append a dataset of the same token type by copying its bytes.

        Raises:
            DataError: `prefix` is damaged or has another token type.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                f"Cannot append {prefix} with tokens of type {other.dtype.name} to {self.prefix} with tokens of type "
                f"{self.dtype.name}",
                fix="Preprocess one of the two again with the tokenizer of the other",
            )
        other.check()
        self._spill()
        with self._writing(), bin_path(prefix).open("rb", buffering=0) as source:
            copy_bytes(source, self._files["bin"], other.num_bytes)
            for low in range(0, len(other), CHUNK):
                self._files["sizes"].write(other.sizes[low : low + CHUNK].tobytes())
            for low in range(1, other.num_documents + 1, CHUNK):
                boundaries = other.document_index[low : low + CHUNK] + self.num_sequences
                self._files["documents"].write(boundaries.tobytes())
        self.num_sequences += len(other)
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens

    def flush(self) -> None:
        """Pass the content so far to the operating system."""
        self._spill()
        with self._writing():
            for file in self._files.values():
                file.flush()

    def sync(self) -> None:
        """Wait until the flushed content is on the disk, from where another writer can continue; for any thread."""
        with self._writing():
            for file in self._files.values():
                os.fdatasync(file.fileno())

    def finish(self) -> None:
        """Write the .idx and rename both files to their final names, replacing an older pair.

        The older .idx is removed first and the new one is renamed last, so an .idx is never next to the .bin of another
        dataset.
        """
        try:
            self._spill()
            with self._writing():
                self._write_index()
                self._flush(self._files["bin"])
                # Renaming the temporary .bin releases the lock on the name: the side files are removed before that, as
                # afterwards they may belong to another writer.
                for part in ("sizes", "documents"):
                    self._paths.pop(part).unlink()
                idx_path(self.prefix).unlink(missing_ok=True)
                self._paths.pop("bin").replace(bin_path(self.prefix))
                self._paths.pop("idx").replace(idx_path(self.prefix))
        finally:
            self.abort()

    def abort(self) -> None:
        """Close all files, and remove unfinished ones unless they are kept: the .bin last, which holds the lock."""
        for path in reversed(self._paths.values()):
            if not self._is_kept:
                path.unlink(missing_ok=True)
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def _to_stored(self, tokens: ArrayLike) -> NDArray[np.generic]:
        """Return the tokens as an array of the stored type; a value out of its range is an error."""
        given = np.asarray(tokens)
        if given.dtype == self.dtype:
            return np.ascontiguousarray(given)
        limits = np.iinfo(self.dtype)
        # Unsigned tokens have no minimum to check.
        if given.size and (given.max() > limits.max or (given.dtype.kind != "u" and given.min() < limits.min)):
            raise DataError(
                f"Cannot write document {self.num_documents} to the dataset {self.prefix}: it has token ids from "
                f"{given.min()} to {given.max()}, and the token type {self.dtype.name} holds "
                f"{limits.min} to {limits.max}",
                fix="Use the tokenizer with which the dataset was begun, or write another dataset, whose token type "
                "follows from the vocabulary size",
            )
        return given.astype(self.dtype)

    def _spill(self) -> None:
        """Write buffered lengths and document boundaries to their files."""
        with self._writing():
            self._files["sizes"].write(np.asarray(self._sizes, dtype="<i4").tobytes())
            self._files["documents"].write(np.asarray(self._documents, dtype="<i8").tobytes())
        del self._sizes[:], self._documents[:]

    def _write_index(self) -> None:
        """Write the .idx from its header and the side files."""
        size = checksum = 0
        header = pack_header(self.dtype, self.num_sequences, self.num_documents + 1)
        with self._paths["idx"].open("wb", buffering=1 << 16) as index:
            for piece in itertools.chain([header], self._pieces("sizes"), self._pointers(), self._pieces("documents")):
                index.write(piece)
                size, checksum = size + len(piece), zlib.crc32(piece, checksum)
            self._flush(index)
        self.index_piece = (size, checksum)

    def _flush(self, file: BinaryIO) -> None:
        file.flush()
        if self._synced:
            os.fsync(file.fileno())

    def _pieces(self, part: str) -> Iterator[bytes]:
        """Yield the content of a side file in chunks."""
        file = self._files[part]
        file.seek(0)
        while piece := file.read(8 * CHUNK):
            yield piece

    def _pointers(self) -> Iterator[bytes]:
        """Yield the byte offsets of the sequences: the exclusive prefix sum of their lengths."""
        before = 0
        for piece in self._pieces("sizes"):
            ends = before + np.cumsum(np.frombuffer(piece, dtype="<i4"), dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate(([before], ends[:-1])).astype("<i8").tobytes()
            before = int(ends[-1])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert an OSError to a DataError that names the dataset."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"Cannot write the dataset {self.prefix}: {reason(error)}",
                fix=remedy(error, self.prefix, instead="give another output prefix", writing=True),
            ) from error


def _open(path: Path) -> BinaryIO:
    """Open a file for reading and writing; it is created if it does not exist."""
    # Batches are larger than the buffer and are written from where they are.
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 16)


def _open_exclusively(path: Path, prefix: str) -> BinaryIO:
    """Open and lock a temporary .bin.

    Raises:
        DataError: another process is writing it.
        OSError: the file cannot be created.
    """
    while True:
        # Not truncated before it is locked, as it may be another process's.
        file = _open(path)
        is_locked = acquire(file, wait=False)
        # If the file was renamed between open and lock, it is another writer's finished dataset: open again.
        if is_locked and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        if not is_locked:
            who, how = holder(file)
            file.close()
            raise DataError(
                f"Cannot write the dataset {prefix}: {who} is writing it",
                fix=f"Wait until that process ends, end it ({how}), or give another output prefix",
            )
