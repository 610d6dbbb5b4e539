"""Work on checkpoints without the cluster that wrote them: compare, average and reshard, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.backend.group import LocalGroup
from megatron_lite.checkpoint.manifest import Manifest, read_manifest
from megatron_lite.checkpoint.names import MAIN_PREFIX, is_model_tensor
from megatron_lite.checkpoint.reading import Read, ReadPlan
from megatron_lite.checkpoint.save import SaveReport, save_checkpoint
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors of one name are apart: largest |a - b|, and the norm of a - b over that of a."""

    name: str
    largest: float
    relative: float
    equal: bool
    """Whether every bit is the same (so NaN equals itself)."""


def read_whole(path: Path, manifest: Manifest, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of a checkpoint, whole, on the CPU, in its saved dtype unless another is given.

    Raises:
        CheckpointError: it is not there.
    """
    saved = manifest.tensors.get(name)
    if saved is None:
        raise CheckpointError(
            "The tensor must be in the checkpoint",
            found=f"{path} has no {name}",
            fix="`megatron-lite checkpoint inspect --tensors` shows its names",
        )
    tensor = torch.empty(saved.shape, dtype=dtype or getattr(torch, saved.dtype))
    ReadPlan(manifest, [Read(_whole(name, tensor), name)]).read(path)
    return tensor


def compare_values(first: Path, second: Path) -> Iterator[TensorDifference]:
    """The differences of the tensors that two checkpoints have in common by name and shape, by name."""
    manifests = read_manifest(first), read_manifest(second)
    for name in sorted(manifests[0].tensors.keys() & manifests[1].tensors.keys()):
        if manifests[0].tensors[name].shape != manifests[1].tensors[name].shape:
            continue
        one, other = read_whole(first, manifests[0], name), read_whole(second, manifests[1], name)
        equal = one.dtype == other.dtype and _bits(one).equal(_bits(other))
        change = one.double() - other.double()
        norm = float(one.double().norm())
        relative = float(change.norm()) / norm if norm else math.inf
        yield TensorDifference(name, float(change.abs().max()), 0.0 if equal else relative, equal)


def average(paths: Sequence[Path], output: Path, notify: Callable[[str], None] = print) -> SaveReport:
    """Writes a checkpoint whose weights are the mean of several checkpoints' weights, without optimizer state.

    The mean is taken of the fp32 main parameters where they were saved, added up in fp64. Iteration, progress and
    config are the last one's.

    Args:
        paths: at least two checkpoints of one run, or of runs of one model.
        output: the folder that the new checkpoint is saved in.
        notify: told about each checkpoint as it is read.

    Raises:
        CheckpointError: fewer than two, one is damaged, or their weights differ in name or shape.
    """
    if len(paths) < 2:
        raise CheckpointError(
            "An average is of at least two checkpoints", found=", ".join(map(str, paths)) or "none", fix="Name more"
        )
    manifests = [_verified(path, notify) for path in paths]
    last = manifests[-1]
    weights = {name: tensor for name, tensor in last.tensors.items() if is_model_tensor(name)}
    for path, manifest in zip(paths, manifests, strict=True):
        shapes = {name: tensor.shape for name, tensor in manifest.tensors.items() if is_model_tensor(name)}
        wanted = {name: tensor.shape for name, tensor in weights.items()}
        if shapes != wanted:
            names = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                "Averaged checkpoints must hold the same weights",
                found=f"{path} and {paths[-1]} differ in {', '.join(names[:5])}",
                fix="Average checkpoints of one model, saved in one precision",
            )
    tensors = []
    for name, saved in weights.items():
        main = MAIN_PREFIX + name
        source = main if main in weights else name
        total = torch.zeros(saved.shape, dtype=torch.float64)
        for path, manifest in zip(paths, manifests, strict=True):
            total += read_whole(path, manifest, source, torch.float64)
        tensors.append(_whole(name, (total / len(paths)).to(getattr(torch, saved.dtype))))
    provenance = last.provenance
    world = LocalGroup("world")
    return save_checkpoint(output, last.iteration, tensors, last.scalars, provenance, world)


def reshard(path: Path, output: Path, *, weights_only: bool, notify: Callable[[str], None] = print) -> SaveReport:
    """Writes a checkpoint again in one file, whatever number of ranks wrote it; every bit of every tensor is the same.

    Any layout reads it without this; it serves to move or keep a checkpoint of many files, or its weights alone.

    Raises:
        CheckpointError: the checkpoint is damaged, or `output` is the folder it lies in.
    """
    if output.resolve() == path.resolve().parent:
        raise CheckpointError(
            "A checkpoint is rewritten into another folder", found=f"{path} lies in {output}", fix="Name another folder"
        )
    manifest = _verified(path, notify)
    names = [name for name in manifest.tensors if is_model_tensor(name) or not weights_only]
    tensors = [_whole(name, read_whole(path, manifest, name)) for name in names]
    world = LocalGroup("world")
    return save_checkpoint(output, manifest.iteration, tensors, manifest.scalars, manifest.provenance, world)


def _verified(path: Path, notify: Callable[[str], None]) -> Manifest:
    manifest = verify_checkpoint(path)
    notify(f"{path}: iteration {manifest.iteration}, {manifest.size / 2**30:.2f} GiB, all files whole")
    return manifest


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _whole(name: str, tensor: Tensor) -> GlobalTensor:
    return GlobalTensor(name, tuple(tensor.shape), tensor.dtype, [Piece((0,) * tensor.dim(), tensor)])
