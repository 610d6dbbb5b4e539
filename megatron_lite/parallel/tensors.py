"""Global tensors: named tensors of the whole model, and the rectangles of them on this rank (checkpoint contents)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from megatron_lite.parallel.parameters import NamedParameter


@dataclass(frozen=True, eq=False)
class Piece:
    """Rectangle of a global tensor: `tensor` has its first element at `offset`."""

    offset: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class GlobalTensor:
    """Pieces of a named global tensor on this rank; several ranks may hold the same piece."""

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece] = field(default_factory=list)
    write: bool = True
    """Whether this rank saves its pieces, if one rank saves them for all that hold them."""
    replica: tuple[int, int] = (0, 1)
    """(i, n): this rank is replica i of n that hold the same pieces; each may save a part of them."""


def parameter_tensor(
    parameter: NamedParameter,
    *,
    write: bool,
    tensor: Tensor | None = None,
    name: str = "",
    replica: tuple[int, int] = (0, 1),
) -> GlobalTensor:
    """Return the global tensor of a parameter, or of a tensor shaped like it.

    Args:
        parameter: gives name, shape and offset.
        write: whether this rank saves it.
        tensor: shaped like the parameter (a moment, a main parameter); None: the parameter's data.
        name: of the global tensor; empty: the parameter's.
        replica: see GlobalTensor.
    """
    local = parameter.local(tensor)
    piece = Piece(parameter.offset, local)
    return GlobalTensor(
        name or parameter.name, parameter.global_shape, local.dtype, [piece] if local.numel() else [], write, replica
    )


@dataclass(frozen=True)
class Rectangle:
    """Rectangle of a tensor whose elements are consecutive in the flattened tensor.

    Attributes:
        offset: index of the first element.
        shape: extent in each dim.
        start: position of the first element in the flattened tensor.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Yield rectangles that cover the elements [start, stop) of a flattened row-major tensor, in order.

    A matrix needs at most three: the end of a row, complete rows, the beginning of a row. Each further dim adds two.
    """
    assert 0 <= start <= stop <= prod(shape), (shape, start, stop)
    if start == stop:
        return
    if len(shape) <= 1:
        yield Rectangle((start,) if shape else (), (stop - start,) if shape else (), start)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the complete rows
    if first > last:
        yield from _within_row(shape, row, start // row, start, stop)
        return
    yield from _within_row(shape, row, start // row, start, first * row)
    if first < last:
        yield Rectangle((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), first * row)
    yield from _within_row(shape, row, last, last * row, stop)


def _within_row(shape: Sequence[int], row: int, index: int, start: int, stop: int) -> Iterator[Rectangle]:
    base = index * row
    for inner in rectangles(shape[1:], start - base, stop - base) if start < stop else ():
        yield Rectangle((index, *inner.offset), (1, *inner.shape), base + inner.start)
