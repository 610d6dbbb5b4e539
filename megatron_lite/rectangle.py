"""Tensor slices (n-dimensional rectangles): offset and shape, intersection, rectangles of a flat range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Rectangle:
    """Rectangle of a tensor with d dims.

    Attributes:
        offset: index of the first element, (d,).
        shape: length in each dim, (d,).
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> Rectangle:
        """Return the rectangle that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """Return the elements that both rectangles of one tensor contain; None: there are none."""
        offset, shape = [], []
        for a, a_length, b, b_length in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start, length = max(a, b), min(a + a_length, b + b_length) - max(a, b)
            if length <= 0:
                return None
            offset.append(start)
            shape.append(length)
        return Rectangle(tuple(offset), tuple(shape))

    def shifted(self, origin: Sequence[int]) -> Rectangle:
        """Return the rectangle of the outer tensor, given the offset `origin` of the inner tensor in it."""
        return Rectangle(tuple(a + b for a, b in zip(self.offset, origin, strict=True)), self.shape)

    def relative_to(self, origin: Sequence[int]) -> Rectangle:
        """Return the rectangle of the inner tensor whose offset in this one is `origin`; the inverse of shifted."""
        return Rectangle(tuple(a - b for a, b in zip(self.offset, origin, strict=True)), self.shape)


def rectangles_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Yield rectangles that cover the elements [start, stop) of a flattened row-major tensor, in order.

    The elements of each rectangle are consecutive in the flattened tensor. A matrix needs at most three: the end of a
    row, complete rows, the beginning of a row. Each further dim adds two.
    """
    assert 0 <= start <= stop <= prod(shape), (shape, start, stop)
    if start == stop:
        return
    if len(shape) <= 1:
        yield Rectangle((start,), (stop - start,)) if shape else Rectangle((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the complete rows
    if first > last:
        yield from _within_row(shape, row, start // row, start, stop)
        return
    yield from _within_row(shape, row, start // row, start, first * row)
    if first < last:
        yield Rectangle((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _within_row(shape, row, last, last * row, stop)


def _within_row(shape: Sequence[int], row: int, index: int, start: int, stop: int) -> Iterator[Rectangle]:
    base = index * row
    for inner in rectangles_of_range(shape[1:], start - base, stop - base) if start < stop else ():
        yield Rectangle((index, *inner.offset), (1, *inner.shape))
