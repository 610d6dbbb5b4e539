"""A range of a flattened tensor as rectangles of the tensor: how a flat shard is saved under global coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """A block of a tensor that is contiguous in its flattened form.

    Attributes:
        offset: the block's first index in each dim.
        shape: its extent in each dim.
        start: where it begins in the flattened tensor.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Covers the elements [start, stop) of a row-major tensor with contiguous blocks, in order.

    A matrix needs at most three: the end of a row, whole rows, the beginning of a row. Each further dim adds two.
    """
    assert 0 <= start <= stop <= prod(shape), (shape, start, stop)
    if start == stop:
        return
    if len(shape) <= 1:
        yield Rectangle((start,) if shape else (), (stop - start,) if shape else (), start)
        return
    row = prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:
        yield from _within_row(shape, row, start // row, start, stop)
        return
    yield from _within_row(shape, row, start // row, start, first_whole * row)
    if first_whole < last_whole:
        offset = (first_whole, *[0] * (len(shape) - 1))
        yield Rectangle(offset, (last_whole - first_whole, *shape[1:]), first_whole * row)
    yield from _within_row(shape, row, last_whole, last_whole * row, stop)


def _within_row(shape: Sequence[int], row: int, index: int, start: int, stop: int) -> Iterator[Rectangle]:
    base = index * row
    for inner in rectangles(shape[1:], start - base, stop - base) if start < stop else ():
        yield Rectangle((index, *inner.offset), (1, *inner.shape), base + inner.start)
