"""Reader of DeepSpeed ZeRO-1 optimizer files: per-parameter tensors from the ranks' flat partitions.

A group is its parameters end to end in the order of `param_shapes`, padded at the end, in equal parts. Files of bf16
runs have the same content under another name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.adam import MAIN, MOMENTS, WEIGHTS_ONLY
from megatron_lite.interop.megatron.found import AdamState
from megatron_lite.interop.megatron.naming import EMBEDDING_FILE, canonical
from megatron_lite.interop.megatron.shards import Part
from megatron_lite.interop.megatron.state_dicts import mapping_of
from megatron_lite.interop.unpickling import Stub, read_torch_file

_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_TIED = "tied_modules.embed."


def read_zero(folder: Path, ranks: Mapping[int, Mapping[str, Any]], tp: int, notes: list[str]) -> AdamState | None:
    """Return the optimizer's state of a DeepSpeed checkpoint; None, and a note: it has none.

    Args:
        folder: global_stepN.
        ranks: content of every mp_rank file, by pipeline stage * tp + tp rank.
        tp: tensor-parallel size.
        notes: receives a note if there is no state.

    Raises:
        CheckpointError: a file is missing or damaged, or of another stage or optimizer.
    """
    files = {
        (int(match[3]), int(match[2])): entry
        for entry in sorted(folder.iterdir())
        if (match := _FILE.fullmatch(entry.name))
    }
    if not files:
        notes.append(f"{folder} has no ZeRO files: only weights are imported")
        return None
    _check_files(folder, files, ranks)
    tensors: dict[str, dict[str, list[Part]]] = {}
    steps: set[int] = set()
    scaler: Mapping[str, Any] = {"kind": "constant"}
    for number in sorted({number for number, _ in files}):
        paths = [path for (rank, _), path in sorted(files.items()) if rank == number]
        states = [_state(path) for path in paths]
        shapes = _shapes(ranks.get(number, {}), folder, number)
        scaler = _scaler(states[0]) if number == 0 else scaler
        for group, named in enumerate(shapes):
            flat, counted = _group(states, paths, group)
            steps |= counted
            _check_fragments(states, paths, group, named)
            for kind, flat_parts in flat.items():
                for name, part in _cut(flat_parts, named, paths, kind).items():
                    # The last stage's copy of the embedding belongs to the first.
                    if number < tp or not name.startswith(_TIED):
                        ours = canonical(name.replace(_TIED, f"{EMBEDDING_FILE}."))
                        tensors.setdefault(kind, {}).setdefault(ours, []).append(part)
    if len(steps) != 1:
        stated = (
            f"different numbers of optimizer steps ({', '.join(map(str, sorted(steps)))})"
            if steps
            else "no number of optimizer steps"
        )
        raise _unfit(folder, f"has {stated}")
    return AdamState(tensors, steps.pop(), scaler)


def _check_files(folder: Path, files: Mapping[tuple[int, int], Path], ranks: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a checkpoint that lacks some of its ZeRO files."""
    first = ranks.get(0, {})
    dp = max([first.get("dp_world_size") or 1, *(rank + 1 for _, rank in files)])
    mp = max([first.get("mp_world_size") or 1, *(number + 1 for number, _ in files), *(n + 1 for n in ranks)])
    prefix = "bf16_" if next(iter(files.values())).name.startswith("bf16_") else ""
    for number in range(mp):
        for rank in range(dp):
            if (number, rank) not in files:
                name = f"{prefix}zero_pp_rank_{rank}_mp_rank_{number:02d}_optim_states.pt"
                raise CheckpointError(
                    f"{folder / name} is missing (the checkpoint has {dp} data-parallel and {mp} model-parallel ranks)",
                    fix=f"Copy this file, too, or {WEIGHTS_ONLY[:1].lower()}{WEIGHTS_ONLY[1:]}",
                )


def _state(path: Path) -> Mapping[str, Any]:
    """Return a file's optimizer state dict."""
    state = mapping_of(read_torch_file(path), path).get("optimizer_state_dict")
    if not isinstance(state, Mapping) or "single_partition_of_fp32_groups" not in state:
        raise _unfit(path, "has no single_partition_of_fp32_groups")
    stage = state.get("zero_stage", 1)
    if isinstance(stage, Stub):
        stage = stage.args[0] if stage.args else 0
    if stage not in (1, 2):  # stage 2 partitions gradients as well; its files are the same
        raise _unfit(path, f"is of ZeRO stage {stage}")
    return state


def _shapes(content: Mapping[str, Any], folder: Path, number: int) -> list[Mapping[str, Sequence[int]]]:
    """Return the shapes of each group's parameters, in their order."""
    shapes = content.get("param_shapes")
    if isinstance(shapes, Mapping):
        shapes = [shapes]
    if not shapes:
        path = folder / f"mp_rank_{number:02d}_model_states.pt"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", fix="Copy this file, too")
        raise _unfit(path, "has no param_shapes")
    return list(shapes)


def _group(
    states: Sequence[Mapping[str, Any]], paths: Sequence[Path], group: int
) -> tuple[dict[str, list[Tensor]], set[int]]:
    """Return a group's flat parts of every data-parallel rank, by kind, and the counts of steps."""
    flat: dict[str, list[Tensor]] = {MAIN: [], **{moment: [] for moment in MOMENTS}}
    steps = set()
    for state, path in zip(states, paths, strict=True):
        mains = state["single_partition_of_fp32_groups"]
        base = state.get("base_optimizer_state")
        if isinstance(base, Mapping) and isinstance(base.get("state"), Mapping):
            groups = base.get("param_groups") or []
            index = groups[group]["params"][0] if group < len(groups) and groups[group].get("params") else group
            moments = base["state"].get(index)
            step = (moments or {}).get("step", groups[group].get("step") if group < len(groups) else None)
        else:
            moments = base[group] if isinstance(base, (list, tuple)) and group < len(base) else None
            step = (moments or {}).get("step", state.get("base_optimizer_state_step"))
        if group >= len(mains) or not moments or any(moment not in moments for moment in MOMENTS):
            raise _unfit(path, f"has no {', '.join(MOMENTS)} of group {group}; Adam has both")
        flat[MAIN].append(mains[group].reshape(-1))
        for moment in MOMENTS:
            flat[moment].append(moments[moment].reshape(-1))
        if step is not None:
            steps.add(int(step))
    return flat, steps


def _cut(
    flat: Sequence[Tensor], named: Mapping[str, Sequence[int]], paths: Sequence[Path], kind: str
) -> dict[str, Part]:
    """Return a group's parameters, each a slice of one flat part or put together from several on demand."""
    total, size = sum(prod(shape) for shape in named.values()), flat[0].numel()
    lengths = [part.numel() for part in flat]
    # All parts are equal but for the padding, which the last one may lack.
    if set(lengths[:-1]) - {size} or lengths[-1] > size or not total <= sum(lengths) < total + 2 * len(flat):
        raise _unfit(paths[0], f"has parts of {', '.join(map(str, lengths))} {kind} elements for {total} of the model")
    found, begin = {}, 0
    for name, shape in named.items():
        found[name] = _part(flat, size, begin, tuple(shape), str(paths[begin // size if size else 0]))
        begin += prod(shape)
    return found


def _part(flat: Sequence[Tensor], size: int, begin: int, shape: tuple[int, ...], where: str) -> Part:
    end = begin + prod(shape)
    first, last = begin // size, (end - 1) // size
    slices = [
        flat[number][max(begin - number * size, 0) : min(end - number * size, size)]
        for number in range(first, last + 1)
    ]

    def load() -> Tensor:
        return (slices[0] if len(slices) == 1 else torch.cat(slices)).view(shape)

    return Part(where, shape, slices[0].dtype, load, is_mapped=len(slices) == 1)


def _check_fragments(
    states: Sequence[Mapping[str, Any]], paths: Sequence[Path], group: int, named: Mapping[str, Sequence[int]]
) -> None:
    """Compare the order of parameters with the file's own table of fragments, where it has one."""
    size = states[0]["single_partition_of_fp32_groups"][group].numel()
    ends = dict(zip(named, accumulate(prod(shape) for shape in named.values()), strict=True))
    for rank, (state, path) in enumerate(zip(states, paths, strict=True)):
        mappings = state.get("param_slice_mappings")
        if not isinstance(mappings, (list, tuple)) or group >= len(mappings):
            continue
        for name, fragment in mappings[group].items():
            address = fragment.state if isinstance(fragment, Stub) else None
            if not isinstance(address, Mapping) or name not in ends:
                continue
            begin = max(ends[name] - prod(named[name]) - rank * size, 0)
            numel = min(ends[name] - rank * size, size) - begin
            if (address.get("start"), address.get("numel")) != (begin, numel):
                raise _unfit(
                    path,
                    f"has {address.get('numel')} elements of {name} at {address.get('start')}, param_shapes gives "
                    f"{numel} at {begin}",
                )


def _scaler(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dynamic loss scaler's state; a constant one has none."""
    scaler = state.get("loss_scaler")
    values = scaler.state if isinstance(scaler, Stub) else scaler
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    if not isinstance(values, Mapping) or any(name not in values for name in names):
        return {"kind": "constant"}
    return {"kind": "deepspeed", "cur_scale": float(values["cur_scale"])} | {
        name: int(values[name]) for name in names[1:]
    }


def _unfit(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}",
        rule="Only the optimizer state of Adam under ZeRO stage 1, for all parameters of the model, can be imported",
        fix=WEIGHTS_ONLY,
    )
