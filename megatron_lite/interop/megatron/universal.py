"""Reader of DeepSpeed universal checkpoints: zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt, one global tensor each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.adam import MOMENTS
from megatron_lite.interop.megatron.arrangements import CURRENT_VERSION
from megatron_lite.interop.megatron.deepspeed import RankFiles, iteration_of_step, read_rank_files
from megatron_lite.interop.megatron.found import AdamState, Found
from megatron_lite.interop.megatron.naming import DEEPSPEED, EMBEDDING_FILE, final_norm_file
from megatron_lite.interop.megatron.shards import Part, mapped
from megatron_lite.interop.megatron.state_dicts import (
    arguments_of,
    mapping_of,
    original_vocab_size,
    scheduler_of,
    version_of,
)
from megatron_lite.interop.unpickling import read_torch_file

_WEIGHTS = "fp32"
_TIED = "tied_modules.embed."
_NUMBERED = re.compile(r"(\d+)\..+")
_GATED = re.compile(r"\d+\.mlp\.dense_h_to_4h\.(weight|bias)")


def read_universal(folder: Path, *, version: float | None = None, with_optimizer: bool = True) -> Found:
    """Read a universal checkpoint's files but for the values of their tensors.

    Args:
        folder: global_stepN_universal.
        version: checkpoint version, where the files do not say it.
        with_optimizer: whether the optimizer's state is wanted.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    ranks = read_rank_files(folder)
    arguments = arguments_of(ranks.first)
    names = sorted(entry.name for entry in (folder / "zero").iterdir() if entry.is_dir())
    parts = {_name(name): _parts(folder, name, _WEIGHTS, arguments or {}) for name in names}
    numbers = [int(match[1]) for name in parts if (match := _NUMBERED.fullmatch(name))]
    if not numbers:
        raise CheckpointError(
            f"{folder / 'zero'} has no folder of a layer's parameter, but {', '.join(names[:3]) or 'no folder at all'}",
            fix="Copy the universal checkpoint again, or convert it again with DeepSpeed's ds_to_universal.py",
        )
    notes: list[str] = []
    adam = _adam(folder, names, ranks, notes) if with_optimizer else None
    where = str(ranks.paths.get(0, folder))
    raw = {f"{name}/{_WEIGHTS}": part for name, found in parts.items() for part in found[:1]}
    return Found(
        folder=folder,
        where=where,
        scheme=DEEPSPEED,
        parts=parts,
        num_layers=max(numbers) - final_norm_file(0),
        arguments=arguments,
        iteration=iteration_of_step(folder, ranks),
        raw=raw,
        version=version_of(ranks.first, where, version, CURRENT_VERSION),
        vocab_size=original_vocab_size(ranks.first, arguments),
        adam=adam,
        scheduler=scheduler_of(ranks.first),
        content=ranks.first,
        notes=notes,
    )


def _name(name: str) -> str:
    return name.replace(_TIED, f"{EMBEDDING_FILE}.")


def _parts(folder: Path, name: str, kind: str, args: Mapping[str, object]) -> list[Part]:
    """Return a tensor as one part; of a gated MLP, as the parts of the tensor-parallel ranks that were joined."""
    path = folder / "zero" / name / f"{kind}.pt"
    tensor = mapping_of(read_torch_file(path), path).get("param")
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{path} does not contain a tensor as its entry param, but {type(tensor).__name__}",
            fix="Copy the universal checkpoint again, or convert it again with DeepSpeed's ds_to_universal.py",
        )
    tp = args.get("tensor_model_parallel_size") if args.get("glu_activation") else 1
    if isinstance(tp, int) and tp > 1 and _GATED.fullmatch(name):
        return [mapped(part, str(path)) for part in tensor.chunk(tp)]
    return [mapped(tensor, str(path))]


def _adam(folder: Path, names: list[str], ranks: RankFiles, notes: list[str]) -> AdamState | None:
    """Return the moments; None, and a note: something says not enough for a run to go on. Weights are fp32 already."""
    steps, skipped = ranks.first.get("global_steps"), ranks.first.get("skipped_steps", 0)
    if not isinstance(steps, int) or not isinstance(skipped, int):
        notes.append(f"{folder} does not say how many steps were made: only weights are imported")
        return None
    args = arguments_of(ranks.first) or {}
    return AdamState(
        {moment: {_name(name): _parts(folder, name, moment, args) for name in names} for moment in MOMENTS},
        steps - skipped,
    )
