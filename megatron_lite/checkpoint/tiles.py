"""Tensor tiling for saves: splits each tensor the same way in every parallel layout, to keep resharding cheap.

A saved record is read and checked in full. If a record were a complete matrix, each of eight tensor-parallel ranks that
split it by columns would read all of it. So the grid's lines lie where such splits fall: at halves, quarters and
eighths of each dim. They depend on the global tensor alone: the number of tiles does not grow with the number of ranks.
Every saved piece lies in one tile, and offline commands work on one tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod

from megatron_lite.rectangle import Rectangle

MIN_TILE = 4 << 20
"""Tiles of fewer bytes are not cut further: a record costs about 1.5 KB on disk and 0.1 ms."""
MAX_TILE = 32 << 20
"""Maximum bytes of a tile, which is a load's memory beyond its own tensors."""
_EVEN_PARTS = 8


def grid(shape: Sequence[int], itemsize: int) -> list[int]:
    """Return the number of parts into which each dim of a tensor is cut, a power of two or the size of the dim.

    Args:
        shape: of the global tensor.
        itemsize: bytes of an element.
    """
    counts = [1] * len(shape)
    size = prod(shape) * itemsize
    while size // prod(counts) >= 2 * MIN_TILE:
        # The dim that is cut least, so that splits by rows and by columns both fall on the grid.
        able = [dim for dim, count in enumerate(counts) if count < _EVEN_PARTS and 2 * count <= shape[dim]]
        if not able:
            break
        counts[min(able, key=lambda dim: counts[dim])] *= 2
    for dim, extent in enumerate(shape):
        # To keep long runs of consecutive bytes, cut the first dim, and the next one only when that has no more rows.
        while counts[dim] < extent and _largest(shape, counts) * itemsize > MAX_TILE:
            counts[dim] = min(2 * counts[dim], extent)
    return counts


def tiles(global_shape: Sequence[int], itemsize: int, rectangle: Rectangle | None = None) -> Iterator[Rectangle]:
    """Yield the parts into which the grid cuts a rectangle of a tensor, in row-major order; none if it is empty.

    Args:
        global_shape: of the tensor.
        itemsize: bytes of an element.
        rectangle: of the tensor; None: all of it.
    """
    cut = Rectangle.full(global_shape) if rectangle is None else rectangle
    counts = grid(global_shape, itemsize)
    for part in product(*(_cut(*dim) for dim in zip(global_shape, counts, cut.offset, cut.shape, strict=True))):
        yield Rectangle(tuple(start for start, _ in part), tuple(length for _, length in part))


def _largest(shape: Sequence[int], counts: Sequence[int]) -> int:
    return prod(-(-extent // count) for extent, count in zip(shape, counts, strict=True))


def _cut(extent: int, count: int, offset: int, length: int) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of [offset, offset + length) in a dim of `extent` cut into `count`."""
    if not length:
        return []
    # Part i is [i * extent // count, (i + 1) * extent // count): tensor parallelism's own bounds where it divides.
    first, last = ((count * (index + 1) - 1) // extent for index in (offset, offset + length - 1))
    inner = [number * extent // count for number in range(first + 1, last + 1)]
    bounds = [offset, *inner, offset + length]
    return [(start, stop - start) for start, stop in pairwise(bounds)]
