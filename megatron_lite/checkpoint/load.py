"""Distributed checkpoint loading: checks names and shapes, reads shards saved by any layout, verifies checksums.

A rank reads what it needs and checks it as it goes. What no rank needs (the optimizer's state in a load of weights) is
shared out among the ranks and read for its checksums alone, so a load fails on any damage that `verify` would find.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lite.backend.agreement import run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.names import is_superseded, source_of
from megatron_lite.checkpoint.reading import Read, ReadPlan
from megatron_lite.checkpoint.verify import verify_lengths, verify_parts
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.runs.catalog import iteration_of, list_checkpoints
from megatron_lite.runs.manifest import CorruptCheckpointError, Manifest, read_manifest

_SHOWN = 5


def load_checkpoint(
    path: Path,
    tensors: Sequence[GlobalTensor],
    world: Group,
    *,
    strict: bool = True,
    include: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Fills the tensors from a checkpoint; a collective call.

    Args:
        path: one checkpoint's folder.
        tensors: what this rank holds; filled in place and converted (names.py says which saved tensor wins).
        world: all ranks.
        strict: whether every saved tensor must have a place in the run. One that the run needs must always be there.
        include: which names take part, of the run's and of the checkpoint's; None: all. names.is_model_tensor leaves
            the optimizer's state out.

    Returns:
        The scalars that were saved.

    Raises:
        CorruptCheckpointError: a file is missing or damaged. Tensors may have been filled, with sound values only.
        CheckpointError: a tensor is missing, left over, or of another shape. No tensor was touched.
    """
    wanted = [tensor for tensor in tensors if include is None or include(tensor.name)]

    def check() -> tuple[Manifest, ReadPlan]:
        manifest = read_manifest(path)
        names = sorted(manifest.files)[world.rank :: world.size]
        verify_lengths(path, {name: manifest.files[name] for name in names})
        reads = [Read(tensor, _check_fits(tensor, manifest, path)) for tensor in wanted]
        return manifest, ReadPlan(manifest, reads)

    manifest, plan = run_on_all_ranks(world, check)
    names = {name for names in world.all_gather_object([tensor.name for tensor in wanted]) for name in names}
    if strict:
        _check_nothing_left(manifest, names, include, path)
    left = list(_unread(manifest, plan, world))[world.rank :: world.size]

    def read() -> None:
        # First, so that the damage is found before anything is filled where it is found by a rank that needs it not.
        for name in sorted({name for name, _ in left}):
            verify_parts(path / name, [manifest.files[name].parts[part] for other, part in left if other == name])
        with torch.no_grad():
            plan.read(path)

    run_on_all_ranks(world, read)
    return dict(manifest.scalars)


def load_latest(
    path: Path,
    tensors: Sequence[GlobalTensor],
    world: Group,
    *,
    include: Callable[[str], bool] | None = None,
    fallback: bool = False,
    notify: Callable[[str], None] = print,
) -> tuple[Path, dict[str, Any]]:
    """Fills the tensors from `path`, or from the newest earlier checkpoint beside it whose bytes are whole.

    Args:
        path: the checkpoint to try first, as catalog.find_checkpoint gives it.
        tensors: as in load_checkpoint.
        world: all ranks; a collective call.
        include: as in load_checkpoint.
        fallback: whether an earlier checkpoint may be taken when one is damaged (--fallback-on-corrupt).
        notify: told which checkpoint was passed over, and why.

    Returns:
        The checkpoint that was loaded, and its scalars.

    Raises:
        CorruptCheckpointError: the checkpoint is damaged, and none may or can take its place.
        CheckpointError: as load_checkpoint.
    """
    number = iteration_of(path) or 0
    earlier = [entry for entry in list_checkpoints(path.parent) if (iteration_of(entry) or 0) < number]
    # Ranks may see different things in a network folder for a moment; rank 0's view is everyone's.
    candidates: list[Path] = world.all_gather_object([path, *reversed(earlier)] if fallback else [path])[0]
    return _load_first(candidates, tensors, world, include, notify)


def _load_first(
    candidates: list[Path],
    tensors: Sequence[GlobalTensor],
    world: Group,
    include: Callable[[str], bool] | None,
    notify: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    candidate, *others = candidates
    try:
        return candidate, load_checkpoint(candidate, tensors, world, include=include)
    except CorruptCheckpointError as error:
        if not others:
            raise
        notify(f"{candidate.name} is damaged and passed over: {error.problem}")
    return _load_first(others, tensors, world, include, notify)


def _unread(manifest: Manifest, plan: ReadPlan, world: Group) -> Iterator[tuple[str, int]]:
    """Files and numbers of their parts that no rank needs; a collective call."""
    parts = [(name, number) for name, file in sorted(manifest.files.items()) for number in range(len(file.parts))]
    # A bit for each part: a hundred thousand parts are 12 KB from each rank.
    mine = plan.parts
    read = np.packbits(np.fromiter((part in mine for part in parts), bool, len(parts)))
    needed = np.unpackbits(np.bitwise_or.reduce(world.all_gather_object(read)))
    return (part for part, is_needed in zip(parts, needed, strict=False) if not is_needed)


def _check_fits(tensor: GlobalTensor, manifest: Manifest, path: Path) -> str:
    """The saved tensor that fills this one; an error if there is none or it is another kind of tensor."""
    source = source_of(tensor.name, tensor.dtype == torch.float32, manifest.tensors)
    if source is None:
        near = difflib.get_close_matches(tensor.name, manifest.tensors, n=1)
        raise CheckpointError(
            "Every tensor of the run must be in the checkpoint",
            found=f"{path} has no {tensor.name}" + (f"; the nearest name is {near[0]}" if near else ""),
            fix="Give the model the options it was saved with (`megatron-lite checkpoint inspect` shows them), or "
            "leave optimizer state out with --no-load-optim",
        )
    saved = manifest.tensors[source]
    if saved.shape != tuple(tensor.global_shape):
        raise CheckpointError(
            "A tensor must have the shape that it was saved with",
            found=f"{tensor.name} is {tuple(tensor.global_shape)} in this run and {saved.shape} in {path}",
            fix="Give the model the sizes it was saved with; parallel sizes may change freely",
        )
    if getattr(torch, saved.dtype).is_floating_point != tensor.dtype.is_floating_point:
        raise CheckpointError(
            "Integers and floating-point numbers are not converted into each other",
            found=f"{tensor.name} is {tensor.dtype} in this run and {saved.dtype} in {path}",
            fix="Load a checkpoint of the same kind of model",
        )
    return source


def _check_nothing_left(manifest: Manifest, names: set[str], include: Callable[[str], bool] | None, path: Path) -> None:
    left = [
        name
        for name in manifest.tensors
        if name not in names and (include is None or include(name)) and not is_superseded(name, names)
    ]
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise CheckpointError(
            "Every tensor of the checkpoint must have a place in the run",
            found=f"this run has no {', '.join(left[:_SHOWN])}{more}, which {path} holds",
            fix="Give the model the options it was saved with; to take the weights only, add --no-load-optim",
        )
