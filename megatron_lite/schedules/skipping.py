"""Sample exclusion: converts consumed samples to dataset positions, skipping excluded ranges.

The *place* of a sample is its position in the data order. Without excluded ranges it equals the number of samples
consumed before it; each excluded range before it adds the length of the range. A range is recorded when a run is rolled
back to a checkpoint and starts behind the last sample consumed there, so places of consumed samples do not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ranges = Sequence[tuple[int, int]]
"""Ranges [first, end) of places, as returned by `merged`."""


def place_of(consumed: int, skipped: Ranges, total: int | None = None) -> int:
    """Return the place of the sample that follows `consumed` consumed samples.

    Args:
        consumed: samples consumed before.
        skipped: excluded ranges.
        total: samples in the data, which restarts to replace the excluded ones; None: unlimited.
    """
    if skipped and total is not None:
        consumed %= max(1, total - sum(max(0, min(end, total) - first) for first, end in skipped))
    place = consumed
    for first, end in skipped:
        if place < first:
            break
        place += end - first
    return place


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the same places as ascending ranges that neither overlap nor touch."""
    result: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if first >= end:
            continue
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return tuple(result)
