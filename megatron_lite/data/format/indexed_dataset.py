"""Reader of Megatron's memory-mapped .bin/.idx datasets."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import (
    HEADER,
    bin_path,
    check_block,
    check_documents,
    check_ends,
    check_pointers,
    damaged_index,
    idx_path,
    read_header,
)
from megatron_lite.data.format.token_file import TokenFile

Block = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Lengths in tokens and byte offsets of consecutive sequences."""

BLOCK = 4096
"""Sequences whose lengths and pointers are read and checked together."""

BLOCKS_KEPT = 64
"""Blocks of a large dataset kept in memory (48 KiB each); the least recently used one is dropped first."""

EAGER = 1 << 22
"""Datasets of up to this many sequences are checked completely when they are opened (a few tens of milliseconds)."""


class IndexedDataset:
    """Reader of a .bin/.idx pair; the index is memory-mapped, so opening takes constant time.

    Inexpensive checks are made on opening, the others block by block before a token of a block is returned. An index
    that does not match its .bin therefore never returns wrong tokens.

    Attributes:
        prefix: path of both files without the suffix.
        dtype: type of the stored tokens.
        sizes: int32 [N] tokens of each sequence.
        pointers: int64 [N] byte offset of each sequence in the .bin.
        document_index: int64 [D] first sequence of each document, and N at the end.

    Raises:
        DataError: a file is missing or damaged, or the files do not match each other.
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
        check_ends(self.prefix, self.sizes, self.pointers, self.document_index, itemsize, self.num_bytes)
        self._header = header
        self._index = TokenFile(idx_path(prefix), np.dtype(np.uint8))
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._is_checked = count <= EAGER
        if self._is_checked:
            self.check()

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.sizes.shape[0]

    @property
    def num_documents(self) -> int:
        """Number of documents (a document has zero or more sequences)."""
        return self.document_index.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the .bin."""
        return self.num_bytes // self.dtype.itemsize

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """Return tokens of a sequence as a read-only array, [length].

        Args:
            index: number of the sequence.
            offset: first token.
            length: number of tokens; None: all from `offset`.

        Raises:
            DataError: the index is damaged around this sequence.
            IndexError: the sequence does not exist, or is shorter.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        sizes, pointers = self._block(index // BLOCK)
        size = int(sizes[index % BLOCK])
        count = size - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > size:
            raise IndexError(f"tokens {offset}:{offset + count} of {size} in sequence {index} of {self.prefix}")
        start = int(pointers[index % BLOCK]) + offset * self.dtype.itemsize
        return self._tokens.read(start, count)

    def count_tokens(self, first: int, last: int) -> int:
        """Return the number of tokens of sequences [first, last), from two pointers.

        Raises:
            DataError: the index is damaged around one of them.
        """
        if first >= last:
            return 0
        sizes, pointers = self._block((last - 1) // BLOCK)
        end = int(pointers[(last - 1) % BLOCK]) + int(sizes[(last - 1) % BLOCK]) * self.dtype.itemsize
        return (end - int(self._block(first // BLOCK)[1][first % BLOCK])) // self.dtype.itemsize

    def find_token(self, token: int, first: int, last: int) -> tuple[int, int]:
        """Return sequence and offset of token number `token` of sequences [first, last), by binary search.

        Raises:
            DataError: the index is damaged where the search ends.
        """
        itemsize = self.dtype.itemsize
        byte = int(self._block(first // BLOCK)[1][first % BLOCK]) + token * itemsize
        low, high = first // BLOCK, (last - 1) // BLOCK
        while low < high:
            middle = (low + high + 1) // 2
            found = self._index.read(self._header.pointers_at + 8 * BLOCK * middle, 8).view("<i8")
            low, high = (middle, high) if found[0] <= byte else (low, middle - 1)
        pointers = self._block(low)[1]
        inside = int(np.searchsorted(pointers, byte, side="right")) - 1
        return low * BLOCK + inside, (byte - int(pointers[inside])) // itemsize

    def length(self, index: int) -> int:
        """Return the tokens of a sequence.

        Raises:
            DataError: the index is damaged around it.
        """
        return int(self._block(index // BLOCK)[0][index % BLOCK])

    def document(self, number: int) -> NDArray[np.generic]:
        """Return all tokens of document `number`, [tokens].

        Raises:
            DataError: the document index is damaged at this document.
        """
        first, last = (int(bound) for bound in self.document_index[number : number + 2])
        if not 0 <= first <= last <= len(self):
            raise damaged_index(self.prefix, f"document {number} is sequences {first} to {last} of {len(self)}")
        parts = [self.get(index) for index in range(first, last)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def _block(self, number: int) -> Block:
        """Return lengths and pointers of sequences [number * BLOCK, (number + 1) * BLOCK).

        Those of a large dataset are read, not mapped: faults of a mapping read ahead and map up to 2 MiB each.

        Raises:
            DataError: the index is damaged there.
        """
        low, high = number * BLOCK, min(len(self), (number + 1) * BLOCK)
        if self._is_checked:
            return self.sizes[low:high], self.pointers[low:high]
        if number not in self._blocks:
            sizes = self._index.read(self._header.sizes_at + 4 * low, 4 * (high - low)).view("<i4")
            entries = min(len(self), high + 1) - low
            pointers = self._index.read(self._header.pointers_at + 8 * low, 8 * entries).view("<i8")
            check_block(self.prefix, sizes, pointers, self.dtype.itemsize, self.num_bytes, low)
            self._blocks[number] = (sizes, pointers[: high - low])
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def check(self, start: int = 0, end: int | None = None) -> None:
        """Check the lengths and pointers of sequences [start, end) and, if these are all sequences, all documents.

        Raises:
            DataError: the index is damaged.
        """
        stop = len(self) if end is None else end
        check_pointers(self.prefix, self.sizes, self.pointers, self.dtype.itemsize, self.num_bytes, start, stop)
        if stop - start == len(self):
            check_documents(self.prefix, self.document_index)
