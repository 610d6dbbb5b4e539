"""Reader and writer of Megatron's memory-mapped .bin/.idx datasets."""

from __future__ import annotations

import contextlib
import itertools
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_lite.data.format import index_checks as checks
from megatron_lite.data.format.file_copy import copy_bytes
from megatron_lite.data.format.file_lock import acquire
from megatron_lite.data.format.index_checks import CHUNK
from megatron_lite.data.format.index_format import HEADER, bin_path, idx_path, pack_header, read_header, type_code
from megatron_lite.data.format.token_file import TokenFile
from megatron_lite.errors import DataError

BLOCK = 4096
"""Sequences whose pointers are checked together, the first time that one of them is read."""

EAGER = 1 << 22
"""Datasets of up to this many sequences are checked whole when they are opened (a few tens of milliseconds)."""


class IndexedDataset:
    """A .bin/.idx pair: the index is mapped, so opening costs the same at ten sequences and at a billion.

    What is cheap is checked on opening, and the rest in blocks before the first token of a block is handed out, so
    that an index which does not belong to its .bin never gives wrong tokens.

    Attributes:
        prefix: path of both files without their endings.
        dtype: type of the stored tokens.
        sizes: int32 [N] tokens of each sequence.
        pointers: int64 [N] byte offset of each sequence in the .bin.
        document_index: int64 [D] first sequence of each document, and N at the end.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        header = read_header(prefix)
        self.dtype: np.dtype = header.dtype
        raw = np.memmap(idx_path(prefix), dtype=np.uint8, mode="r")
        count = header.num_sequences
        self.sizes: NDArray[np.int32] = np.frombuffer(raw, dtype="<i4", count=count, offset=HEADER.size)
        self.pointers: NDArray[np.int64] = np.frombuffer(raw, dtype="<i8", count=count, offset=header.pointers_at)
        self.document_index: NDArray[np.int64] = np.frombuffer(
            raw, dtype="<i8", count=header.num_document_entries, offset=header.documents_at
        )
        self._tokens = TokenFile(bin_path(prefix), self.dtype)
        self.num_bytes = self._tokens.num_bytes
        itemsize = self.dtype.itemsize
        checks.check_ends(self.prefix, self.sizes, self.pointers, self.document_index, itemsize, self.num_bytes)
        self._checked: NDArray[np.bool_] = np.zeros(-(-count // BLOCK), dtype=np.bool_)
        if count <= EAGER:
            self.check()
            self._checked[:] = True

    def __len__(self) -> int:
        """Number of sequences."""
        return self.sizes.shape[0]

    @property
    def num_documents(self) -> int:
        """Number of documents (a document is one or more sequences, or none)."""
        return self.document_index.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the .bin."""
        return self.num_bytes // self.dtype.itemsize

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """Tokens of sequence `index` from `offset` on, `length` of them or all: read-only, [length].

        Raises:
            DataError: the index is damaged around this sequence.
            IndexError: there is no such sequence, or it is shorter.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        block = index // BLOCK
        if not self._checked[block]:
            self.check(block * BLOCK, min(len(self), (block + 1) * BLOCK))
            self._checked[block] = True
        size = int(self.sizes[index])
        count = size - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > size:
            raise IndexError(f"tokens {offset}:{offset + count} of {size} in sequence {index} of {self.prefix}")
        start = int(self.pointers[index]) + offset * self.dtype.itemsize
        return self._tokens.read(start, count)

    def document(self, number: int) -> NDArray[np.generic]:
        """All tokens of document `number`, [tokens].

        Raises:
            DataError: the document index is damaged here.
        """
        first, last = (int(bound) for bound in self.document_index[number : number + 2])
        if not 0 <= first <= last <= len(self):
            raise checks.damaged(self.prefix, f"document {number} is sequences {first} to {last} of {len(self)}")
        parts = [self.get(index) for index in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def check(self, start: int = 0, end: int | None = None) -> None:
        """Check every length and pointer of sequences [start, end) and, if that is all of them, every document.

        Raises:
            DataError: the index is damaged.
        """
        stop = len(self) if end is None else end
        checks.check_pointers(self.prefix, self.sizes, self.pointers, self.dtype.itemsize, self.num_bytes, start, stop)
        if stop - start == len(self):
            checks.check_documents(self.prefix, self.document_index)


class IndexedDatasetWriter:
    """Writes a .bin/.idx pair beside its final names; `finish` renames both, the .idx last.

    Memory does not grow with the dataset: lengths and document boundaries go to files of their own, from which the
    .idx is put together at the end. As a context manager it finishes, or cleans up if the block raised.

    Args:
        prefix: path of both files without their endings.
        dtype: type of the stored tokens (index_format.smallest_token_type gives Megatron's choice).

    Raises:
        DataError: the folder cannot be written to, the disk is full, another process writes to the same name, or a
            token does not fit `dtype`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type[np.integer]) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        type_code(self.dtype)
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0
        self._sizes = array("i")
        self._documents = array("q", [0])
        self._paths = {part: Path(f"{prefix}.{part}.tmp") for part in ("bin", "idx", "sizes", "documents")}
        with self._writing():
            self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
            self._files: dict[str, BinaryIO] = {"bin": _open_alone(self._paths["bin"], self.prefix)}
            for part in ("sizes", "documents"):
                self._files[part] = self._paths[part].open("w+b", buffering=1 << 20)

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append one sequence, [tokens], to the document that is open; `end_document` closes it."""
        stored = self._to_stored(tokens)
        with self._writing():
            self._files["bin"].write(stored.data)
        self._sizes.append(stored.shape[0])
        self.num_sequences += 1
        self.num_tokens += stored.shape[0]
        if len(self._sizes) >= BLOCK:
            self._spill()

    def end_document(self) -> None:
        """Close the open document; without a sequence it is an entry of none, as Megatron-LM keeps empty documents."""
        self._documents.append(self.num_sequences)
        self.num_documents += 1
        if len(self._documents) >= BLOCK:
            self._spill()

    def add_document(self, tokens: ArrayLike) -> None:
        """Append a document of one sequence, [tokens]; without any token, a document of no sequence."""
        stored = self._to_stored(tokens)
        if stored.shape[0]:
            self.add_sequence(stored)
        self.end_document()

    def add_documents(self, tokens: NDArray[np.generic]) -> None:
        """Append documents of one sequence and of equal length, [documents, length > 0]."""
        stored = self._to_stored(tokens)
        count, length = stored.shape
        with self._writing():
            self._files["bin"].write(stored.data)
        self._sizes.extend([length] * count)
        self._documents.extend(range(self.num_sequences + 1, self.num_sequences + count + 1))
        self.num_sequences += count
        self.num_documents += count
        self.num_tokens += stored.size
        self._spill()

    def append(self, prefix: str | Path) -> None:
        """Append a whole dataset of the same token type by copying its bytes, inside the kernel where it can.

        Raises:
            DataError: `prefix` is damaged or has another token type.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                "Datasets that are merged have one token type",
                found=f"{prefix} has {other.dtype.name}, {self.prefix} has {self.dtype.name}",
                fix="Preprocess them with the same tokenizer",
            )
        other.check()
        self._spill()
        with self._writing(), bin_path(prefix).open("rb") as source:
            self._files["bin"].flush()
            copy_bytes(source, self._files["bin"], other.num_bytes)
            for low in range(0, len(other), CHUNK):
                self._files["sizes"].write(other.sizes[low : low + CHUNK].tobytes())
            for low in range(1, other.num_documents + 1, CHUNK):
                boundaries = other.document_index[low : low + CHUNK] + self.num_sequences
                self._files["documents"].write(boundaries.tobytes())
        self.num_sequences += len(other)
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens

    def finish(self) -> None:
        """Write the .idx and give both files their final names, replacing an older pair.

        The older .idx goes first and the new one comes last, so that at no time an .idx stands beside a .bin that is
        not its own.
        """
        try:
            self._spill()
            with self._writing():
                self._write_index()
                self._files["bin"].flush()
                os.fsync(self._files["bin"].fileno())
                # With its first name the .bin gives up what keeps other writers out: nothing of theirs may be touched.
                for part in ("sizes", "documents"):
                    self._paths.pop(part).unlink()
                idx_path(self.prefix).unlink(missing_ok=True)
                self._paths.pop("bin").replace(bin_path(self.prefix))
                self._paths.pop("idx").replace(idx_path(self.prefix))
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove everything that was not finished; the .bin, which keeps other writers out, last."""
        for path in reversed(self._paths.values()):
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
        """The tokens as an array of the stored type; a value that it cannot hold is an error, never wrapped."""
        given = np.asarray(tokens)
        if given.dtype == self.dtype:
            return np.ascontiguousarray(given)
        limits = np.iinfo(self.dtype)
        if given.size and (given.min() < limits.min or given.max() > limits.max):
            raise DataError(
                f"A token fits the stored type ({self.dtype.name}: {limits.min} to {limits.max})",
                found=f"tokens from {given.min()} to {given.max()} in document {self.num_documents}",
                fix="Preprocess with the tokenizer whose vocabulary the type was chosen for",
            )
        return given.astype(self.dtype)

    def _spill(self) -> None:
        """Move the lengths and boundaries kept in memory to their files."""
        with self._writing():
            self._files["sizes"].write(np.asarray(self._sizes, dtype="<i4").tobytes())
            self._files["documents"].write(np.asarray(self._documents, dtype="<i8").tobytes())
        del self._sizes[:], self._documents[:]

    def _write_index(self) -> None:
        """Put the .idx together from its header and the side files."""
        with self._paths["idx"].open("wb", buffering=1 << 20) as index:
            index.write(pack_header(self.dtype, self.num_sequences, self.num_documents + 1))
            for piece in itertools.chain(self._pieces("sizes"), self._pointers(), self._pieces("documents")):
                index.write(piece)
            index.flush()
            os.fsync(index.fileno())

    def _pieces(self, part: str) -> Iterator[bytes]:
        """The content of a side file from its start."""
        file = self._files[part]
        file.seek(0)
        while piece := file.read(8 * CHUNK):
            yield piece

    def _pointers(self) -> Iterator[bytes]:
        """Byte offsets of the sequences: the exclusive prefix sum of their lengths."""
        before = 0
        for piece in self._pieces("sizes"):
            ends = before + np.cumsum(np.frombuffer(piece, dtype="<i4"), dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate(([before], ends[:-1])).astype("<i8").tobytes()
            before = int(ends[-1])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the file system refuses into an error that names the file."""
        try:
            yield
        except OSError as error:
            raise DataError(
                "A dataset can be written where it is asked for",
                found=f"{self.prefix}: {error.strerror or error}",
                fix="Free or ask for space, or write to another folder",
            ) from error


def _open_alone(path: Path, prefix: str) -> BinaryIO:
    """Open an unfinished .bin, empty, for as long as no other process writes to it.

    Raises:
        DataError: one does.
        OSError: the file cannot be made.
    """
    while True:
        # Neither emptied, for it may be another's, nor opened to append, which copying inside the kernel refuses.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        alone = acquire(file, wait=False)
        # A file that was opened before its writer gave it its final name is that dataset's now.
        if alone and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            return file
        file.close()
        if not alone:
            raise DataError(
                "One command at a time writes a dataset",
                found=f"another process is writing {prefix}",
                fix="Wait for it, or give another name",
            )
