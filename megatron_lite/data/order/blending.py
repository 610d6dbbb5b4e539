"""Blend index: Megatron's greedy rule that assigns each sample of a blend to a source.

At step i the source with the largest error w_d * max(i, 1) - count_d is taken, the first of equals, all in double
precision. The counts before a far sample (a run that resumes) are found without walking there, and exactly:

- No count is ever far above its share: what is taken has an error of at least 0, so count_d <= w_d * i + 1.
- Order is kept. Let counts B be nowhere below counts A. If A takes d and A_d = B_d, then d's is the largest error of B
  too, and the first of equals, so B takes it as well: after the step B is nowhere below A. Rounding is no exception:
  a difference never rounds to more when more is subtracted.
- So a walk from those upper bounds, a few takings too many in all, stays above the rule's own. These go one by one: of
  which source one is (the hole) is not known, but every step moves the hole of each source that would be taken without
  it to the one that is taken with it. Soon all possible holes are one, and the next has its turn. When no taking is too
  many, the counts are the rule's own.

A few hundred steps do for weights down to a hundredth of a percent. Where a far smaller source stays in doubt, all
chunks from the beginning on are walked side by side from guessed counts, and again from the ends of their neighbours
wherever a guess was wrong, until every chunk begins where the one before it ended: the rule's own counts, by induction.
Nothing is built beforehand and nothing is cached on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
"""How often each source was taken, [sources]: whole numbers, and so exact as doubles."""

CHUNK = 1 << 12
"""Samples whose sources are worked out together."""

KEPT = 128
"""Chunks whose choices are kept in memory; the least recently used goes first."""

STARTS = 1 << 12
"""Chunks whose counts at the beginning are kept in memory, the first one and those that were added last."""

SIDE_BY_SIDE = 1 << 14
"""Chunks that are walked side by side."""

REACHES = (1 << 8, 1 << 11, 1 << 14, 1 << 17)
"""Steps before a far sample at which a walk from upper bounds begins: the next where one was too short."""

ROUNDING = 2.0**-50
"""Times the number of steps: more than rounding makes of an error."""

WARM_UP = 1 << 10
"""Steps walked before a chunk from a guess: walks from different counts soon fall in with each other."""


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
        self.weights: NDArray[np.float64] = np.array(weights, dtype=np.float64)
        self._starts: dict[int, Counts] = {0: np.zeros_like(self.weights)}
        self._chunks: OrderedDict[int, tuple[NDArray[np.int16], NDArray[np.int64]]] = OrderedDict()

    def lookup(self, sample: int) -> tuple[int, int]:
        """Source of sample `sample`, and its number among that source's samples."""
        sources, numbers = self.chunk(sample // CHUNK)
        return int(sources[sample % CHUNK]), int(numbers[sample % CHUNK])

    def chunk(self, index: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Sources and their sample numbers of samples [index * CHUNK, (index + 1) * CHUNK): int16 and int64 [CHUNK]."""
        if index not in self._chunks:
            if index not in self._starts:
                self._reach(index)
            counts = self._starts[index].copy()
            sources, numbers = np.empty(CHUNK, dtype=np.int16), np.empty(CHUNK, dtype=np.int64)
            for place in range(CHUNK):
                source = take(self.weights, counts, index * CHUNK + place)
                sources[place], numbers[place] = source, counts[source]
                counts[source] += 1
            self._starts[index + 1] = counts
            while len(self._starts) > STARTS:
                del self._starts[next(start for start in self._starts if start)]
            self._chunks[index] = (sources, numbers)
            if len(self._chunks) > KEPT:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(index)
        return self._chunks[index]

    def _reach(self, index: int) -> None:
        """Make the counts at the beginning of chunk `index` known."""
        for reach in REACHES:
            if reach < index * CHUNK and (counts := settle(self.weights, index * CHUNK, reach)) is not None:
                self._starts[index] = counts
                return
        known = max(start for start in self._starts if start < index)
        while known < index:
            # Not all at once: a blend of a billion samples has a quarter of a million chunks.
            step = min(SIDE_BY_SIDE, index - known)
            self._starts[known + step] = walk_side_by_side(self.weights, self._starts[known], known, step)[-1].copy()
            known += step


def take(weights: NDArray[np.float64], counts: Counts, step: int) -> int:
    """The rule itself: the source that step `step` takes after `counts`."""
    return int(np.argmax(weights * max(step, 1) - counts))


def settle(weights: NDArray[np.float64], sample: int, reach: int) -> Counts | None:
    """Counts before `sample`, from a walk of `reach` steps; None if it leaves more than one possibility."""
    start = sample - reach
    slack = start * (abs(float(weights.sum()) - 1.0) + ROUNDING)
    counts = np.floor(weights * start + 1.0 + slack)
    too_many = int(counts.sum()) - start
    holes = np.ones(weights.shape[0], dtype=np.bool_)
    for step in range(start, sample):
        source = take(weights, counts, step)
        if too_many:
            shares = weights * step
            largest = shares[source] - counts[source]
            without = shares - (counts - 1.0)
            moves = without > largest
            moves[:source] |= without[:source] == largest
            moved = bool((moves & holes).any())
            holes &= ~moves
            holes[source] |= moved
        counts[source] += 1
        if too_many and np.count_nonzero(holes) == 1:
            counts[holes] -= 1
            too_many -= 1
            holes[:] = True
    return None if too_many else counts


def walk_side_by_side(weights: NDArray[np.float64], counts: Counts, first: int, num_chunks: int) -> Counts:
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
    return np.ascontiguousarray(ends.T)


def _warmed_up(weights: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Guessed counts before each start, [sources, starts]: rounded shares, walked on from WARM_UP steps earlier."""
    before = np.maximum(starts - WARM_UP, 0)
    ideal = weights[:, None] * before
    counts = np.floor(ideal)
    missing = before - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - ideal, axis=0, kind="stable"), axis=0)
    return _advance(weights, counts + (rank < missing), before, WARM_UP)


def _advance(
    weights: NDArray[np.float64], counts: NDArray[np.float64], starts: NDArray[np.int64], steps: int
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
