"""Single-process reading and comparison of checkpoints, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.reading import Read, ReadPlan
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors of one name are apart: largest |a - b|, and the norm of a - b over that of a."""

    name: str
    largest: float
    relative: float
    equal: bool
    """Whether every bit is the same (so NaN equals itself)."""


def read_rectangle(
    path: Path, manifest: Manifest, name: str, offset: Sequence[int], shape: Sequence[int], dtype: torch.dtype | None
) -> Tensor:
    """A rectangle of a tensor of a checkpoint, on the CPU, in its saved dtype unless another is given.

    Raises:
        CorruptCheckpointError: what holds it is damaged.
    """
    saved = manifest.tensors[name]
    tensor = torch.empty(tuple(shape), dtype=dtype or getattr(torch, saved.dtype))
    target = GlobalTensor(name, saved.shape, tensor.dtype, [Piece(tuple(offset), tensor)])
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
    return read_rectangle(path, manifest, name, (0,) * len(saved.shape), saved.shape, None)


def compare_values(first: Path, second: Path) -> Iterator[TensorDifference]:
    """The differences of the tensors that two checkpoints have in common by name and shape, by name."""
    manifests = read_manifest(first), read_manifest(second)
    for name in sorted(manifests[0].tensors.keys() & manifests[1].tensors.keys()):
        saved, other = (manifest.tensors[name] for manifest in manifests)
        if saved.shape != other.shape:
            continue
        equal, largest, squares = saved.dtype == other.dtype, torch.zeros(()), torch.zeros(2, dtype=torch.float64)
        itemsize = getattr(torch, saved.dtype).itemsize
        for offset, shape in tiles(saved.shape, itemsize, (0,) * len(saved.shape), saved.shape):
            one = read_rectangle(first, manifests[0], name, offset, shape, None)
            two = read_rectangle(second, manifests[1], name, offset, shape, None)
            equal = equal and _bits(one).equal(_bits(two))
            change = one.double() - two.double()
            # torch's maximum, which keeps a NaN; Python's does not.
            largest = torch.maximum(largest, change.abs().max())
            squares += torch.stack([change.square().sum(), one.double().square().sum()])
        difference, norm = squares.sqrt().tolist()
        yield TensorDifference(name, float(largest), 0.0 if equal else difference / norm if norm else math.inf, equal)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
