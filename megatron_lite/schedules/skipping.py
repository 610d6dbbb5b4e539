"""Excluded samples: maps consumed samples to dataset positions, passing over excluded ranges.

A sample's *place* is its number in the order of the data. Without ranges to leave out it is the number of samples
consumed before it; each range that lies before it moves it on by the range's length. A range is recorded when a run
goes back to a checkpoint, and begins at a place that was not reached there: what was consumed before keeps its places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ranges = Sequence[tuple[int, int]]
"""Ranges [first, end) of places, as `merged` gives them."""


def place_of(consumed: int, skipped: Ranges, total: int | None = None) -> int:
    """Place of the sample that is trained on after `consumed` others.

    Args:
        consumed: samples consumed before it.
        skipped: ranges that are left out.
        total: samples of the data, which begins anew for as many as were left out of it; None: it has no end.
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
    """The same places as ranges in order that neither overlap nor touch."""
    result: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if first >= end:
            continue
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((first, end))
    return tuple(result)
