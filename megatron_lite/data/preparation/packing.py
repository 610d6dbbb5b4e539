"""Best-fit-decreasing packing: assigns pieces of documents to sequences of one length.

The algorithm is that of Ding et al. 2024, "Fewer Truncations Improve Language Modeling"
(https://arxiv.org/abs/2404.10830).

Every document is cut into pieces: full sequences, and the remainder. A document that fits in a sequence is one piece.
Pieces are packed in windows of WINDOW tokens, each read and written at once, which bounds memory and avoids seeks. A
window has so many pieces that packing it separately costs hardly any padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.indexed_dataset import IndexedDataset

WINDOW = 1 << 26
"""Tokens that are packed together."""

DOCUMENTS = 1 << 20
"""Documents whose lengths are processed together."""


@dataclass(frozen=True)
class PackingWindow:
    """Consecutive pieces of a dataset.

    Attributes:
        start: offset of the first piece in the file, in tokens.
        lengths: int64 [pieces] tokens of each piece, from 1 to the sequence length; pieces are contiguous.
        ends_document: bool [pieces] True for the last piece of a document.
    """

    start: int
    lengths: NDArray[np.int64]
    ends_document: NDArray[np.bool_]


def windows(data: IndexedDataset, seq_length: int, size: int = WINDOW) -> Iterator[PackingWindow]:
    """Yield the pieces of all documents in order, in windows of about `size` tokens."""
    size = max(size, seq_length)
    document = start = 0
    while document < data.num_documents:
        ends = document_ends(data, document, min(data.num_documents, document + DOCUMENTS))
        # Documents that end within the window; for a document longer than the window, as many full pieces as fit.
        count = int(np.searchsorted(ends, start + size, side="right"))
        if count:
            lengths = np.diff(ends[:count], prepend=start)
            pieces, last = cut(lengths[lengths > 0], seq_length)
            document += count
        else:
            pieces = np.full(size // seq_length, seq_length, dtype=np.int64)
            last = np.zeros(pieces.shape, dtype=np.bool_)
        if pieces.shape[0]:
            yield PackingWindow(start, pieces, last)
            start += int(pieces.sum())


def document_ends(data: IndexedDataset, first: int, last: int) -> NDArray[np.int64]:
    """Return the end of each of documents [first, last) in tokens of the file, int64 [last - first]."""
    sequences = data.document_index[first + 1 : last + 1]
    inside = sequences < len(data)
    ends = np.full(sequences.shape, data.num_tokens, dtype=np.int64)
    ends[inside] = data.pointers[sequences[inside]] // data.dtype.itemsize
    return ends


def cut(lengths: NDArray[np.int64], seq_length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Document lengths (at least 1) -> piece lengths, and True for each piece that is the last of its document."""
    counts = -(-lengths // seq_length)
    last_pieces = np.cumsum(counts) - 1
    pieces = np.full(int(counts.sum()), seq_length, dtype=np.int64)
    pieces[last_pieces] = lengths - (counts - 1) * seq_length
    last = np.zeros(pieces.shape, dtype=np.bool_)
    last[last_pieces] = True
    return pieces, last


def best_fit(lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Assign pieces to bins: longest piece first, each into the fullest bin with enough space.

    Pieces of equal length and bins of equal space are processed together: the time depends on the number of distinct
    pairs of length and space, which does not grow with the number of pieces.

    Args:
        lengths: [pieces] from 1 to seq_length tokens.
        seq_length: size of a bin.

    Returns:
        int64 [pieces] bin of each piece, from 0.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=seq_length + 1)
    bins = np.empty(lengths.shape, dtype=np.int64)
    open_bins = _Bins(seq_length)
    placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        for space in open_bins.spaces(length):
            each = space // length
            taken = open_bins.take(space, -(-left // each))
            count = min(left, taken.shape[0] * each)
            bins[order[placed : placed + count]] = np.repeat(taken, each)[:count]
            full, rest = divmod(count, each)
            open_bins.give(space - each * length, taken[:full])
            open_bins.give(space - rest * length, taken[full:])
            placed, left = placed + count, left - count
            if not left:
                break
    return bins


class _Bins:
    """Partly filled bins by free space; full bins are dropped, new bins are created on demand."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length
        self.num_bins = 0
        self._bins: list[list[NDArray[np.int64]]] = [[] for _ in range(seq_length)]
        self._some: NDArray[np.bool_] = np.zeros(seq_length, dtype=np.bool_)

    def spaces(self, length: int) -> list[int]:
        """Return the free spaces of at least `length`, in increasing order; the last one is that of a new bin."""
        return [*(length + np.flatnonzero(self._some[length:])).tolist(), self.seq_length]

    def take(self, space: int, wanted: int) -> NDArray[np.int64]:
        """Remove and return at most `wanted` bins with this space, oldest first."""
        if space == self.seq_length:
            self.num_bins += wanted
            return np.arange(self.num_bins - wanted, self.num_bins)
        found = np.concatenate(self._bins[space])
        self._bins[space] = [found[wanted:]] if found.shape[0] > wanted else []
        self._some[space] = found.shape[0] > wanted
        return found[:wanted]

    def give(self, space: int, bins: NDArray[np.int64]) -> None:
        """Add bins that now have this space."""
        if space and bins.shape[0]:
            self._bins[space].append(bins)
            self._some[space] = True


def lay_out(
    window: PackingWindow, seq_length: int, rng: np.random.RandomState
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute the position of each piece of a window.

    Pieces of a bin keep the order of the file. The position of a bin in the output is that of a random token of the
    bin in the input. Every part of the packed file (in particular the end, which --split uses for validation) then has
    the same distribution of document lengths as the same part of the corpus.

    Returns:
        int64 [pieces]: first token of each piece, relative to the first bin; and
        int64 [bins]: tokens in each bin before the padding.
    """
    bins = best_fit(window.lengths, seq_length)
    order = np.argsort(bins, kind="stable")
    sorted_bins = bins[order]
    lengths = window.lengths[order]
    ends = np.cumsum(lengths)
    filled = np.add.reduceat(lengths, np.flatnonzero(np.diff(sorted_bins, prepend=-1)))
    begins = np.cumsum(filled) - filled
    tokens = begins + (rng.random_sample(filled.shape[0]) * filled).astype(np.int64)
    chosen = np.argsort(order[np.searchsorted(ends, tokens, side="right")])
    positions = np.empty_like(chosen)
    positions[chosen] = np.arange(chosen.shape[0])
    targets = np.empty_like(order)
    targets[order] = positions[sorted_bins] * seq_length + (ends - lengths) - begins[sorted_bins]
    return targets, filled[chosen]
