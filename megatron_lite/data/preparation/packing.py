"""Best-fit-decreasing packing of documents into sequences (Ding et al. 2024, "Fewer Truncations Improve
Language Modeling", https://arxiv.org/abs/2404.10830).

Every document is cut into pieces: full ones of the sequence's length, and what is left of it. A document that is no
longer than a sequence is one piece. Pieces are packed window by window of some ten million tokens, read in one go and
written in one go, so that neither memory nor seeks grow with the dataset; a window holds so many pieces that packing it
by itself costs next to no padding.
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
"""Documents whose lengths are looked at together."""


@dataclass(frozen=True)
class Window:
    """Consecutive pieces of a dataset.

    Attributes:
        start: token of the file at which the first begins.
        lengths: int64 [pieces] tokens of each, 1 to the sequence's length; each begins where the one before it ends.
        ends_document: bool [pieces] whether a piece is the last of its document.
    """

    start: int
    lengths: NDArray[np.int64]
    ends_document: NDArray[np.bool_]


def windows(data: IndexedDataset, seq_length: int, size: int = WINDOW) -> Iterator[Window]:
    """Yield the pieces of all documents in order, about `size` tokens at a time, cut between pieces only."""
    size = max(size, seq_length)
    document = start = 0
    while document < data.num_documents:
        ends = document_ends(data, document, min(data.num_documents, document + DOCUMENTS))
        # Documents that end within the window; of one that is longer than that, as many full pieces as fit.
        whole = int(np.searchsorted(ends, start + size, side="right"))
        if whole:
            lengths = np.diff(ends[:whole], prepend=start)
            pieces, last = cut(lengths[lengths > 0], seq_length)
            document += whole
        else:
            pieces = np.full(size // seq_length, seq_length, dtype=np.int64)
            last = np.zeros(pieces.shape, dtype=np.bool_)
        if pieces.shape[0]:
            yield Window(start, pieces, last)
            start += int(pieces.sum())


def document_ends(data: IndexedDataset, first: int, last: int) -> NDArray[np.int64]:
    """Token of the file at which each of documents [first, last) ends, int64 [last - first]."""
    sequences = data.document_index[first + 1 : last + 1]
    inside = sequences < len(data)
    ends = np.full(sequences.shape, data.num_tokens, dtype=np.int64)
    ends[inside] = data.pointers[sequences[inside]] // data.dtype.itemsize
    return ends


def cut(lengths: NDArray[np.int64], seq_length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Documents of `lengths` (at least 1) -> lengths of their pieces, and whether each is its document's last."""
    counts = -(-lengths // seq_length)
    last_ones = np.cumsum(counts) - 1
    pieces = np.full(int(counts.sum()), seq_length, dtype=np.int64)
    pieces[last_ones] = lengths - (counts - 1) * seq_length
    last = np.zeros(pieces.shape, dtype=np.bool_)
    last[last_ones] = True
    return pieces, last


def best_fit(lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """The bin, from 0, of each piece: the longest pieces first, each into the fullest bin in which it has room.

    Pieces of one length, and bins with one space left, are handled together: the time does not grow with the number of
    pieces, but with that of pairs of lengths and spaces that meet.

    Args:
        lengths: [pieces] of 1 to seq_length tokens.
        seq_length: room of a bin.

    Returns:
        int64 [pieces]
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=seq_length + 1)
    bins = np.empty(lengths.shape, dtype=np.int64)
    room = _Room(seq_length)
    placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        for space in room.spaces(length):
            each = space // length
            taken = room.take(space, -(-left // each))
            count = min(left, taken.shape[0] * each)
            bins[order[placed : placed + count]] = np.repeat(taken, each)[:count]
            whole, over = divmod(count, each)
            room.give(space - each * length, taken[:whole])
            room.give(space - over * length, taken[whole:])
            placed, left = placed + count, left - count
            if not left:
                break
    return bins


class _Room:
    """Bins by the space that is left in them; full ones are forgotten, and of empty ones there are always more."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length
        self.num_bins = 0
        self._bins: list[list[NDArray[np.int64]]] = [[] for _ in range(seq_length)]
        self._some: NDArray[np.bool_] = np.zeros(seq_length, dtype=np.bool_)

    def spaces(self, length: int) -> list[int]:
        """Spaces of `length` or more that bins have left, the smallest first."""
        return [*(length + np.flatnonzero(self._some[length:])).tolist(), self.seq_length]

    def take(self, space: int, wanted: int) -> NDArray[np.int64]:
        """At most `wanted` bins with this space, those that have it longest first."""
        if space == self.seq_length:
            self.num_bins += wanted
            return np.arange(self.num_bins - wanted, self.num_bins)
        found = np.concatenate(self._bins[space])
        self._bins[space] = [found[wanted:]] if found.shape[0] > wanted else []
        self._some[space] = found.shape[0] > wanted
        return found[:wanted]

    def give(self, space: int, bins: NDArray[np.int64]) -> None:
        """Bins that now have this space."""
        if space and bins.shape[0]:
            self._bins[space].append(bins)
            self._some[space] = True


def lay_out(window: Window, seq_length: int, rng: np.random.RandomState) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where a window's pieces go.

    In a bin they keep the order of the file. A bin stands where a random one of its tokens stood, so that any part of
    the packed file, the end that --split takes for validation above all, has short and long documents as the corpus has
    them, from about the same place.

    Returns:
        int64 [pieces]: token, from the first bin's first, at which each piece begins; and
        int64 [bins]: tokens in each bin before its padding.
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
    places = np.empty_like(chosen)
    places[chosen] = np.arange(chosen.shape[0])
    targets = np.empty_like(order)
    targets[order] = places[sorted_bins] * seq_length + (ends - lengths) - begins[sorted_bins]
    return targets, filled[chosen]
