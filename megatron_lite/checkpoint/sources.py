"""Tensor source interface: named tensors read lazily by slices; blockwise comparison of two sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.rectangle import Rectangle


@dataclass(frozen=True)
class TensorInfo:
    """Shape of a tensor, and its dtype as torch spells it without the prefix."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def full(self) -> Rectangle:
        """Rectangle that covers the tensor."""
        return Rectangle.full(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return itemsize


class TensorSource(Protocol):
    """Set of named tensors that can be read by rectangles, in whatever file format."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name."""

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a tensor, on the CPU, in the dtype that `tensors` states.

        Raises:
            CheckpointError: the file that holds it is missing or damaged.
        """


@dataclass(frozen=True)
class TensorDifference:
    """Difference of two tensors a and b of one name: largest |a - b|, and the norm of a - b over that of a."""

    name: str
    largest: float
    relative: float
    equal: bool
    """True if every bit is the same (so NaN equals itself)."""


def compare_sources(first: TensorSource, second: TensorSource) -> Iterator[TensorDifference]:
    """Yield the differences of the tensors that two sources have in common by name and shape, by name."""
    for name in sorted(first.tensors.keys() & second.tensors.keys()):
        info, other = first.tensors[name], second.tensors[name]
        if info.shape != other.shape:
            continue
        equal, largest, squares = info.dtype == other.dtype, torch.zeros(()), torch.zeros(2, dtype=torch.float64)
        for tile in tiles(info.shape, info.itemsize):
            one, two = first.read(name, tile), second.read(name, tile)
            equal = equal and _bits(one).equal(_bits(two))
            change = one.double() - two.double()
            # torch's maximum, which keeps a NaN; Python's does not.
            largest = torch.maximum(largest, change.abs().max())
            squares += torch.stack([change.square().sum(), one.double().square().sum()])
        difference, norm = squares.sqrt().tolist()
        yield TensorDifference(name, float(largest), 0.0 if equal else difference / norm if norm else math.inf, equal)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
