"""Single-process reading and comparison of checkpoints, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_lite.checkpoint.reading import Read, ReadPlan
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.manifest import Manifest, read_manifest


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
    """A set of named tensors that can be read rectangle by rectangle, whatever files hold them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name."""

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a tensor, on the CPU, in the dtype that `tensors` states.

        Raises:
            CheckpointError: the file that holds it is missing or damaged.
        """


class CheckpointSource:
    """Tensors of a megatron_lite checkpoint as a TensorSource.

    Args:
        path: the checkpoint's folder.
        manifest: its manifest; None: read it.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = read_manifest(path) if manifest is None else manifest
        self._tensors = {name: TensorInfo(saved.shape, saved.dtype) for name, saved in self.manifest.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every saved tensor, the optimizer's included."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a saved tensor."""
        return read_rectangle(self.path, self.manifest, name, rectangle, None)


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors of one name are apart: largest |a - b|, and the norm of a - b over that of a."""

    name: str
    largest: float
    relative: float
    equal: bool
    """Whether every bit is the same (so NaN equals itself)."""


def read_rectangle(
    path: Path, manifest: Manifest, name: str, rectangle: Rectangle, dtype: torch.dtype | None
) -> Tensor:
    """A rectangle of a tensor of a checkpoint, on the CPU, in its saved dtype unless another is given.

    Raises:
        CorruptCheckpointError: what holds it is damaged.
    """
    saved = manifest.tensors[name]
    tensor = torch.empty(rectangle.shape, dtype=dtype or getattr(torch, saved.dtype))
    target = GlobalTensor(name, saved.shape, tensor.dtype, [Piece(rectangle.offset, tensor)])
    ReadPlan(manifest, [Read(target, name)]).read(path)
    return tensor


def read_whole(path: Path, manifest: Manifest, name: str) -> Tensor:
    """One tensor of a checkpoint, whole, on the CPU, in its saved dtype.

    Raises:
        CheckpointError: it is not there.
        CorruptCheckpointError: what holds it is damaged.
    """
    saved = manifest.tensors.get(name)
    if saved is None:
        raise CheckpointError(
            "The tensor must be in the checkpoint",
            found=f"{path} has no {name}",
            fix="`megatron-lite checkpoint inspect --tensors` shows its names",
        )
    return read_rectangle(path, manifest, name, Rectangle.full(saved.shape), None)


def compare_values(first: Path, second: Path) -> Iterator[TensorDifference]:
    """Return the differences of the tensors that two checkpoints have in common by name and shape, by name."""
    return compare_sources(CheckpointSource(first), CheckpointSource(second))


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
