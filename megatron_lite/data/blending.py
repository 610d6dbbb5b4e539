"""Which source of a blend sample i comes from, and which of that source's samples it is: Megatron's greedy rule.

At step i the source with the largest error w_d * max(i, 1) - count_d is taken, the first of equals, all in double
precision. Steps depend on those before them only through the counts, so the counts at the borders of chunks are all
that is kept. To reach a far sample (a run that resumes), all chunks before it are walked side by side from guessed
counts, and again from the ends of their neighbours wherever a guess was wrong, until every chunk begins where the one
before it ended: the rule's own counts, by induction. Nothing is built beforehand and nothing is cached on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 13
"""Samples between remembered counts."""

KEPT = 64
"""Chunks whose choices are kept in memory; the least recently used goes first."""

WARM_UP = 1 << 10
"""Steps walked before a chunk from a guess: walks from different counts soon fall in with each other."""

SIDE_BY_SIDE = 48
"""Chunks from which on walking them side by side beats one after the other."""


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, as numpy sums them, which is how both generations do it."""
    values = np.array(weights, dtype=np.float64)
    return [float(share) for share in values / np.sum(values)]


class BlendIndex:
    """The blend of sources with the given weights, evaluated where it is asked for.

    Args:
        weights: [sources] normalised.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = [float(weight) for weight in weights]
        self._counts: NDArray[np.int64] = np.zeros((1, len(weights)), dtype=np.int64)
        self._chunks: OrderedDict[int, tuple[NDArray[np.int16], NDArray[np.int64]]] = OrderedDict()

    def lookup(self, sample: int) -> tuple[int, int]:
        """Source of sample `sample`, and its number among that source's samples."""
        sources, numbers = self.chunk(sample // CHUNK)
        return int(sources[sample % CHUNK]), int(numbers[sample % CHUNK])

    def chunk(self, index: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Sources and their sample numbers of samples [index * CHUNK, (index + 1) * CHUNK): int16 and int64 [CHUNK]."""
        if index not in self._chunks:
            self._reach(index)
            sources, ends = walk(self.weights, self._counts[index].tolist(), index * CHUNK, CHUNK)
            if self._counts.shape[0] == index + 1:
                self._counts = np.concatenate([self._counts, [ends]])
            self._chunks[index] = (sources, self._number(sources, self._counts[index]))
            if len(self._chunks) > KEPT:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(index)
        return self._chunks[index]

    def _reach(self, index: int) -> None:
        """Make the counts at the beginning of chunk `index` known."""
        known = self._counts.shape[0] - 1
        if index - known >= SIDE_BY_SIDE:
            found = walk_side_by_side(self.weights, self._counts[-1], known, index - known)
            self._counts = np.concatenate([self._counts, found])
        while self._counts.shape[0] <= index:
            last = self._counts.shape[0] - 1
            _, ends = walk(self.weights, self._counts[last].tolist(), last * CHUNK, CHUNK)
            self._counts = np.concatenate([self._counts, [ends]])

    def _number(self, sources: NDArray[np.int16], counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples of the same source came before each sample, [CHUNK]."""
        numbers = np.empty(sources.shape[0], dtype=np.int64)
        for source, before in enumerate(counts):
            mine = np.flatnonzero(sources == source)
            numbers[mine] = before + np.arange(mine.shape[0])
        return numbers


def walk(weights: list[float], counts: list[int], start: int, steps: int) -> tuple[NDArray[np.int16], list[int]]:
    """The rule itself, step by step from `start`: the sources taken, int16 [steps], and the counts after them."""
    counts = list(counts)
    taken = []
    others = range(1, len(weights))
    for step in range(start, start + steps):
        passed = float(step) if step else 1.0
        source, largest = 0, weights[0] * passed - counts[0]
        for other in others:
            error = weights[other] * passed - counts[other]
            if error > largest:
                source, largest = other, error
        counts[source] += 1
        taken.append(source)
    return np.array(taken, dtype=np.int16), counts


def walk_side_by_side(
    weights: list[float], counts: NDArray[np.int64], first: int, num_chunks: int
) -> NDArray[np.int64]:
    """Counts at the end of num_chunks chunks from `first` on, [num_chunks, sources], given those before `first`."""
    starts = (first + np.arange(num_chunks, dtype=np.int64)) * CHUNK
    begins = _warmed_up(weights, starts)
    begins[:, 0] = counts
    ends = np.empty_like(begins)
    wrong = np.arange(num_chunks)
    while wrong.size:
        ends[:, wrong] = _advance(weights, begins[:, wrong], starts[wrong], CHUNK)
        differs = (begins[:, 1:] != ends[:, :-1]).any(axis=0)
        wrong = 1 + np.flatnonzero(differs)
        begins[:, wrong] = ends[:, wrong - 1]
    return ends.T.astype(np.int64)


def _warmed_up(weights: list[float], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Guessed counts before each start, [sources, starts]: rounded shares, walked on from WARM_UP steps earlier."""
    before = np.maximum(starts - WARM_UP, 0)
    ideal = np.array(weights)[:, None] * before
    counts = np.floor(ideal)
    missing = before - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - ideal, axis=0, kind="stable"), axis=0)
    return _advance(weights, counts + (rank < missing), before, WARM_UP)


def _advance(
    weights: list[float], counts: NDArray[np.float64], starts: NDArray[np.int64], steps: int
) -> NDArray[np.float64]:
    """Apply the rule `steps` times to every column of counts [sources, starts] (whole, so exact as doubles)."""
    counts = np.ascontiguousarray(counts, dtype=np.float64)
    passed = starts.astype(np.float64)
    largest, error = np.empty_like(passed), np.empty_like(passed)
    better = np.empty(passed.shape, dtype=np.bool_)
    source = np.empty(passed.shape, dtype=np.int16)
    for _ in range(steps):
        at_least_one = np.maximum(passed, 1.0)
        source[:] = 0
        np.multiply(at_least_one, weights[0], out=largest)
        largest -= counts[0]
        for other in range(1, len(weights)):
            np.multiply(at_least_one, weights[other], out=error)
            error -= counts[other]
            np.greater(error, largest, out=better)
            np.copyto(largest, error, where=better)
            np.copyto(source, other, where=better)
        for other in range(len(weights)):
            np.equal(source, other, out=better)
            counts[other] += better
        passed += 1.0
    return counts
