"""Checkpoint loading into a run: matches tensors by name and shape, fills this rank's shards in any layout.

A rank reads and verifies its own part of the tensors. Parts that no rank needs (the optimizer's state in a load of
weights) are divided among the ranks and read for their checksums alone, so that a load fails on any damage that
`checkpoint verify` would find.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lite.backend.agreement import run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.names import (
    EMA_PREFIX,
    MAIN_PREFIX,
    has_optimizer,
    is_model_tensor,
    is_optional,
    is_superseded,
    source_of,
)
from megatron_lite.checkpoint.reading import CheckpointReader, ReadPlan
from megatron_lite.checkpoint.verify import check_sizes, verify_parts
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_shape
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.runs.catalog import iteration_of, list_checkpoints
from megatron_lite.runs.manifest import CorruptCheckpointError, Manifest, SavedPart

_SHOWN = 5


def load_checkpoint(
    path: Path,
    tensors: Sequence[GlobalTensor],
    world: Group,
    *,
    weights_only: bool = False,
    averaged: bool = False,
    restart_average: bool = False,
) -> dict[str, Any]:
    """Fill tensors from a checkpoint; a collective call.

    Args:
        path: one checkpoint's folder.
        tensors: state on this rank, filled in place and converted (names.py chooses the saved tensor of each). Optional
            ones (names.is_optional) are left unchanged if the checkpoint does not have them in the same shape.
        world: all ranks.
        weights_only: leave out the optimizer's state, of the run and of the checkpoint, except main parameters.
        averaged: fill the weights with the checkpoint's moving average of them.
        restart_average: fill the run's moving average with the weights, as where the checkpoint has none.

    Returns:
        The saved scalars.

    Raises:
        CorruptCheckpointError: a file is missing or damaged. Tensors may have been filled, with sound values only.
        CheckpointError: a tensor is missing, left over, or of another shape. No tensor was changed.
    """
    wanted = [
        tensor
        for tensor in tensors
        if not weights_only or is_model_tensor(tensor.name) or tensor.name.startswith(EMA_PREFIX)
    ]

    def check() -> tuple[CheckpointReader, ReadPlan]:
        reader = CheckpointReader(path)
        check_sizes(path, reader.manifest, sorted(reader.manifest.files)[world.rank :: world.size])
        names = averages(reader) if averaged else {}
        if restart_average:
            names |= {EMA_PREFIX + tensor.name: tensor.name for tensor in wanted}
        found = [tensor for tensor in wanted if not is_optional(tensor.name) or _is_saved(tensor, reader)]
        return reader, reader.plan([(t, _find_source(t, names.get(t.name, t.name), reader)) for t in found])

    reader, plan = run_on_all_ranks(world, check)
    run = {name for names in world.all_gather_object([tensor.name for tensor in wanted]) for name in names}
    saved = [name for name in reader.tensors if not weights_only or is_model_tensor(name)]
    _check_none_left_over(saved, run, path)
    unread: dict[str, list[SavedPart]] = {}
    for name, number in list(_unread(reader.manifest, plan, world))[world.rank :: world.size]:
        unread.setdefault(name, []).append(reader.manifest.files[name].parts[number])

    def read() -> None:
        # Before any tensor is filled: damage that another rank finds should leave this rank's tensors alone.
        for name, parts in unread.items():
            verify_parts(path / name, parts)
        with torch.no_grad():
            plan.read()

    run_on_all_ranks(world, read)
    return dict(reader.manifest.scalars)


def load_latest(
    path: Path,
    tensors: Sequence[GlobalTensor],
    world: Group,
    *,
    weights_only: bool = False,
    restart_average: bool = False,
    fallback: bool = False,
) -> tuple[Path, dict[str, Any], list[str]]:
    """Fill tensors from `path`, or from the newest earlier checkpoint beside it that is not damaged.

    Args:
        path: the checkpoint to try first, as found by catalog.find_checkpoint.
        tensors: as in load_checkpoint.
        world: all ranks; a collective call.
        weights_only: as in load_checkpoint.
        restart_average: as in load_checkpoint.
        fallback: allow an earlier checkpoint if one is damaged (--fallback-on-corrupt).

    Returns:
        The loaded checkpoint, its scalars, and a message about each damaged checkpoint that was skipped.

    Raises:
        CorruptCheckpointError: the checkpoint is damaged, and no earlier one may or can replace it.
        CheckpointError: as load_checkpoint.
    """
    number = iteration_of(path) or 0
    earlier = [entry for entry in list_checkpoints(path.parent) if (iteration_of(entry) or 0) < number]
    # Ranks may see different contents of a network folder for a moment: all use rank 0's.
    candidates: list[Path] = world.all_gather_object([path, *reversed(earlier)] if fallback else [path])[0]
    skipped: list[str] = []
    while True:
        candidate = candidates.pop(0)
        try:
            scalars = load_checkpoint(
                candidate, tensors, world, weights_only=weights_only, restart_average=restart_average
            )
            return candidate, scalars, skipped
        except CorruptCheckpointError as error:
            if not candidates:
                raise
            skipped.append(f"WARNING: skipped the damaged checkpoint {candidate.name}: {error.problem}")


def _unread(manifest: Manifest, plan: ReadPlan, world: Group) -> Iterator[tuple[str, int]]:
    """Return files and numbers of the parts that no rank needs; a collective call."""
    parts = [(name, number) for name, file in sorted(manifest.files.items()) for number in range(len(file.parts))]
    # A bit for each part: a hundred thousand parts are 12 KB from each rank.
    mine = plan.parts
    read = np.packbits(np.fromiter((part in mine for part in parts), bool, len(parts)))
    needed = np.unpackbits(np.bitwise_or.reduce(world.all_gather_object(read)))
    return (part for part, is_needed in zip(parts, needed, strict=False) if not is_needed)


def _is_saved(tensor: GlobalTensor, reader: CheckpointReader) -> bool:
    saved = reader.tensors.get(tensor.name)
    return saved is not None and tuple(saved.shape) == tuple(tensor.global_shape)


def averages(reader: CheckpointReader) -> dict[str, str]:
    """Return the names of the moving averages of a checkpoint, by the weight's and the main parameter's.

    Raises:
        CheckpointError: it has none.
    """
    found = [name for name in reader.tensors if name.startswith(EMA_PREFIX)]
    if not found:
        raise CheckpointError(
            f"The checkpoint {reader.path} has no moving average of the weights (--ema)",
            fix="Remove --ema, or give a checkpoint of a run with --ema-decay",
        )
    weights = {name.removeprefix(EMA_PREFIX): name for name in found}
    return weights | {MAIN_PREFIX + weight: name for weight, name in weights.items()}


def _find_source(tensor: GlobalTensor, name: str, reader: CheckpointReader) -> str:
    """Return the name of the saved tensor that fills a tensor.

    Args:
        tensor: to fill.
        name: of the tensor whose values it takes; usually its own.
        reader: of the checkpoint.

    Raises:
        CheckpointError: there is none, or it has another shape or kind of dtype.
    """
    saved = reader.manifest.tensors
    source = source_of(name, tensor.dtype == torch.float32, saved)
    if source is None and not is_model_tensor(tensor.name) and not has_optimizer(saved):
        raise CheckpointError(
            f"The checkpoint {reader.path} has no optimizer state",
            fix="Add --finetune to start a run from its weights at iteration 0, or --no-load-optim to continue at its "
            "iteration with a fresh optimizer",
        )
    if source is None:
        near = difflib.get_close_matches(tensor.name, saved, n=1)
        raise CheckpointError(
            f'Checkpoint {reader.path} does not contain the tensor "{tensor.name}", which this run needs'
            + (f'; the nearest name is "{near[0]}"' if near else ""),
            fix=f"Use the model flags with which it was saved: `megatron-lite checkpoint inspect {reader.path}` "
            "prints them"
            + (
                ""
                if is_model_tensor(tensor.name)
                else ". To load the weights without optimizer state, as after a change of --freeze, add --no-load-optim"
            ),
        )
    info = reader.tensors[source]
    if info.shape != tuple(tensor.global_shape):
        raise CheckpointError(
            f'The tensor "{tensor.name}" has the shape {format_shape(tensor.global_shape)} in this run and '
            f'{format_shape(info.shape)} in the checkpoint "{reader.path}"',
            fix="Use the sizes of the model (--num-layers, --hidden-size, …) with which it was saved: `megatron-lite "
            f"checkpoint inspect {reader.path}` prints them. Parallel sizes may differ",
        )
    if getattr(torch, info.dtype).is_floating_point != tensor.dtype.is_floating_point:
        raise CheckpointError(
            f'The tensor "{tensor.name}" has the dtype {str(tensor.dtype).removeprefix("torch.")} in this run and '
            f'{info.dtype} in the checkpoint "{reader.path}"',
            rule="Integers and floating-point numbers are not converted into each other",
            fix="Load a checkpoint of the same model, written by the same version of megatron_lite",
        )
    return source


def _check_none_left_over(saved: Sequence[str], run: Collection[str], path: Path) -> None:
    """Refuse a checkpoint with tensors for which the run has no place."""
    left = [name for name in saved if name not in run and not is_superseded(name, run) and not is_optional(name)]
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        if all(name.startswith(EMA_PREFIX) for name in left):
            raise CheckpointError(
                f"The checkpoint {path} has a moving average of the weights, and this run has none (--ema-decay)",
                fix="Add the --ema-decay with which it was saved, or --no-load-optim to load the weights alone",
            )
        raise CheckpointError(
            f"The checkpoint {path} contains tensors that this run does not have: {', '.join(left[:_SHOWN])}{more}",
            fix="Use the model and optimizer flags with which it was saved: `megatron-lite checkpoint inspect "
            f"{path}` prints "
            "them. If only optimizer state is left over, --no-load-optim loads the weights without it",
        )
