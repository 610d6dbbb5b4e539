"""Blend index: Megatron's greedy rule that assigns each sample of a blend to a source.

Step i takes the source d with the largest error w_d * max(i, 1) - count_d, the first one of equals, in double
precision. Resuming at a far sample needs the counts before it. They are computed exactly, without all steps before it:

- Upper bound: the source that is taken has an error of at least 0, so count_d <= w_d * i + 1.
- Monotonicity: let counts B >= counts A in every component. If A takes d and A_d = B_d, then d also has the largest
  error of B (the first of equals), so B takes d as well, and B >= A after the step. Rounding preserves this: a
  difference never rounds to more when more is subtracted.
- A walk that starts from the upper bounds therefore stays above the exact counts; its total exceeds theirs by a few
  units. The source that a surplus unit belongs to is unknown. `candidates` is the set of sources that it may belong
  to; each step maps a candidate that would have been taken without the surplus to the source that is taken with it.
  Once one candidate is left, the unit is subtracted from it and the next unit follows. Without surplus the counts are
  exact.

A few hundred steps suffice for weights down to a hundredth of a percent. If a much smaller source remains ambiguous,
all chunks from the beginning are advanced in parallel from estimated counts. Chunks whose estimate differs from the end
of the chunk before them are repeated from that end, until all agree: by induction these are the exact counts.
No table is built in advance and nothing is cached on disk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
"""Samples taken from each source, [sources]: whole numbers, exact as doubles."""

CHUNK = 1 << 12
"""Samples whose sources are computed together."""

KEPT = 128
"""Chunks kept in memory; the least recently used one is dropped first."""

STARTS = 1 << 12
"""Chunks whose initial counts are kept in memory: the first one and the most recently added ones."""

PARALLEL_CHUNKS = 1 << 14
"""Chunks that are advanced in parallel."""

REACHES = (1 << 8, 1 << 11, 1 << 14, 1 << 17)
"""Steps before a far sample at which a walk from the upper bounds starts; the next value if one was too short."""

ROUNDING = 2.0**-50
"""Bound on the rounding of an error, per step."""

WARM_UP = 1 << 10
"""Steps from estimated counts before a chunk: walks that start from different counts converge quickly."""


def normalize(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum, in numpy's order of summation, which both generations use."""
    values = np.array(weights, dtype=np.float64)
    return [float(share) for share in values / np.sum(values)]


class BlendIndex:
    """Lookup of the source of each sample of a blend, computed chunk by chunk on demand.

    Args:
        weights: [sources], normalized.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights: NDArray[np.float64] = np.array(weights, dtype=np.float64)
        self._starts: dict[int, Counts] = {0: np.zeros_like(self.weights)}
        self._chunks: OrderedDict[int, tuple[NDArray[np.int16], NDArray[np.int64]]] = OrderedDict()

    def lookup(self, sample: int) -> tuple[int, int]:
        """Return the source of sample `sample`, and the sample's number within that source."""
        sources, numbers = self.chunk(sample // CHUNK)
        return int(sources[sample % CHUNK]), int(numbers[sample % CHUNK])

    def chunk(self, index: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Return sources and their sample numbers of samples [index * CHUNK, (index + 1) * CHUNK): [CHUNK] each."""
        if index not in self._chunks:
            if index not in self._starts:
                self._reach(index)
            counts = self._starts[index].copy()
            sources, numbers = np.empty(CHUNK, dtype=np.int16), np.empty(CHUNK, dtype=np.int64)
            for step in range(CHUNK):
                source = take(self.weights, counts, index * CHUNK + step)
                sources[step], numbers[step] = source, counts[source]
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
        """Compute the counts at the beginning of chunk `index`."""
        for reach in REACHES:
            if reach < index * CHUNK and (counts := counts_before(self.weights, index * CHUNK, reach)) is not None:
                self._starts[index] = counts
                return
        known = max(start for start in self._starts if start < index)
        while known < index:
            # In portions: a blend of a billion samples has a quarter of a million chunks.
            step = min(PARALLEL_CHUNKS, index - known)
            self._starts[known + step] = advance_chunks(self.weights, self._starts[known], known, step)[-1].copy()
            known += step


def take(weights: NDArray[np.float64], counts: Counts, step: int) -> int:
    """Return the source that step `step` takes after `counts` (the greedy rule)."""
    return int(np.argmax(weights * max(step, 1) - counts))


def counts_before(weights: NDArray[np.float64], sample: int, reach: int) -> Counts | None:
    """Return the counts before `sample` from a walk of `reach` steps; None if they remain ambiguous."""
    start = sample - reach
    slack = start * (abs(float(weights.sum()) - 1.0) + ROUNDING)
    counts = np.floor(weights * start + 1.0 + slack)
    surplus = int(counts.sum()) - start
    candidates = np.ones(weights.shape[0], dtype=np.bool_)
    for step in range(start, sample):
        source = take(weights, counts, step)
        if surplus:
            shares = weights * step
            largest = shares[source] - counts[source]
            without = shares - (counts - 1.0)
            moves = without > largest
            moves[:source] |= without[:source] == largest
            moved = bool((moves & candidates).any())
            candidates &= ~moves
            candidates[source] |= moved
        counts[source] += 1
        if surplus and np.count_nonzero(candidates) == 1:
            counts[candidates] -= 1
            surplus -= 1
            candidates[:] = True
    return None if surplus else counts


def advance_chunks(weights: NDArray[np.float64], counts: Counts, first: int, num_chunks: int) -> Counts:
    """Return the counts at the end of each of `num_chunks` chunks, [num_chunks, sources].

    Args:
        weights: [sources].
        counts: [sources] counts before chunk `first`.
        first: number of the first chunk.
        num_chunks: chunks that are advanced in parallel.
    """
    starts = (first + np.arange(num_chunks, dtype=np.int64)) * CHUNK
    begins = _estimate(weights, starts)
    begins[:, 0] = counts
    ends = np.empty_like(begins)
    wrong = np.arange(num_chunks)
    while wrong.size:
        ends[:, wrong] = _advance(weights, begins[:, wrong], starts[wrong], CHUNK)
        differs = (begins[:, 1:] != ends[:, :-1]).any(axis=0)
        wrong = 1 + np.flatnonzero(differs)
        begins[:, wrong] = ends[:, wrong - 1]
    return np.ascontiguousarray(ends.T)


def _estimate(weights: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return estimated counts before each start, [sources, starts]: rounded shares, advanced by WARM_UP steps."""
    before = np.maximum(starts - WARM_UP, 0)
    ideal = weights[:, None] * before
    counts = np.floor(ideal)
    missing = before - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - ideal, axis=0, kind="stable"), axis=0)
    return _advance(weights, counts + (rank < missing), before, WARM_UP)


def _advance(
    weights: NDArray[np.float64], counts: NDArray[np.float64], starts: NDArray[np.int64], steps: int
) -> NDArray[np.float64]:
    """Apply the greedy rule `steps` times to every column of counts, [sources, starts]."""
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
