"""Reader of Adam state in Megatron-LM classic checkpoints: rank files or distributed-optimizer files.

Neither names parameters: the order of registration, which is that of the model's state dict, does. Parameters are
grouped into those with weight decay (matrices) and those without (vectors), and the groups' order varies between
versions, so a group is recognised by its shapes. Main parameters are compared with the weights when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.found import AdamState
from megatron_lite.interop.megatron.shards import Part, mapped
from megatron_lite.interop.unpickling import read_torch_file

if TYPE_CHECKING:
    from megatron_lite.interop.megatron.classic import Rank

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main_param"
_DISTRIBUTED = "distrib_optim.pt"
_DISTRIBUTED_KINDS = {"param": MAIN, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
WEIGHTS_ONLY = "Import the weights alone with --weights-only"


def tensors_within(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts and lists, named by their path."""
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_within(value, f"{prefix}.{key}")
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from tensors_within(value, f"{prefix}.{number}")


def read_adam(ranks: Sequence[Rank], folder: Path, notes: list[str]) -> AdamState | None:
    """Return the optimizer's state of a classic checkpoint; None, and a note: it has none.

    Args:
        ranks: every rank's file, in the order of pp, then tp.
        folder: the checkpoint's folder.
        notes: receives a note if there is no state.

    Raises:
        CheckpointError: it is of an optimizer or in a form that is not supported, or does not fit the model.
    """
    states = [_optimizer(rank) for rank in ranks]
    if not any(states):
        notes.append(f"{folder} has no optimizer state: only weights are imported")
        return None
    tensors: dict[str, dict[str, list[Part]]] = {}
    steps = set()
    for rank, state in zip(ranks, states, strict=True):
        if state is None:
            raise _unfit(rank.path, "has no optimizer state, but the files of other ranks have")
        inner = _inner(state, rank.path)
        distributed = rank.path.parent / _DISTRIBUTED
        if inner.get("state"):
            found = _plain(rank, inner, state)
        elif distributed.is_file():
            found = _flat(rank, distributed)
        else:
            raise _unfit(rank.path, f"has an optimizer without state, and {distributed} is missing")
        for kind, parts in found.items():
            for name, part in parts.items():
                tensors.setdefault(kind, {}).setdefault(name, []).append(part)
        steps |= _steps(inner)
    if len(steps) != 1:
        stated = (
            f"different numbers of optimizer steps ({', '.join(map(str, sorted(steps)))})"
            if steps
            else "no number of optimizer steps"
        )
        raise _unfit(folder, f"has {stated}")
    return AdamState(tensors, steps.pop(), _scaler(states[0]))


def _optimizer(rank: Rank) -> Mapping[str, Any] | None:
    """Return a rank's optimizer state dict; a chain of one optimizer is that optimizer."""
    state = rank.content.get("optimizer")
    if isinstance(state, (list, tuple)) and len(state) == 1:
        state = state[0]
    if isinstance(state, Mapping) and set(state) == {0}:
        state = state[0]
    if not state:
        return None
    if not isinstance(state, Mapping):
        raise _unfit(rank.path, f"has an optimizer state that is a {type(state).__name__} of {len(state)}")
    return state


def _inner(state: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the state dict of torch's or Apex's Adam."""
    for name in ("optimizer", "optimizer_state_dict"):
        if isinstance(state.get(name), Mapping):
            inner: Mapping[str, Any] = state[name]
            return inner
    if "param_groups" in state:
        return state
    raise _unfit(path, f"has an optimizer with {', '.join(map(str, state))}")


def _plain(rank: Rank, inner: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, dict[str, Part]]:
    """Return main parameters and moments of a rank whose file has them tensor by tensor."""
    where = str(rank.path)
    mains = state.get("fp32_from_fp16_params") or state.get("fp32_from_fp16") or ()
    found: dict[str, dict[str, Part]] = {}
    seen: set[str] = set()
    for number, group in enumerate(inner["param_groups"]):
        entries = [inner["state"].get(index) for index in group["params"]]
        if not all(isinstance(entry, Mapping) and all(name in entry for name in MOMENTS) for entry in entries):
            raise _unfit(rank.path, f"has an optimizer group {number} without {' and '.join(MOMENTS)}; Adam has both")
        names = _names_of_group(rank, [tuple(entry["exp_avg"].shape) for entry in entries], number)
        if mains and len(mains[number]) != len(names):
            raise _unfit(rank.path, f"has {len(mains[number])} main parameters and {len(names)} moments")
        for position, (name, entry) in enumerate(zip(names, entries, strict=True)):
            values = {moment: entry[moment] for moment in MOMENTS}
            if mains:
                values[MAIN] = mains[number][position]
            for kind, tensor in values.items():
                found.setdefault(kind, {})[name] = mapped(tensor, where)
        seen |= set(names)
    if seen != set(rank.names):
        raise _unfit(rank.path, f"has no optimizer state of {', '.join(sorted(set(rank.names) - seen)[:3])}")
    return found


def _names_of_group(rank: Rank, shapes: Sequence[tuple[int, ...]], number: int) -> list[str]:
    """Return the parameters of a group: all matrices, all vectors, or all, in their order."""
    dims = {name: rank.tensors[name].dim() for name in rank.names}
    candidates = (
        [name for name in rank.names if dims[name] > 1],
        [name for name in rank.names if dims[name] <= 1],
        rank.names,
    )
    for names in candidates:
        if [tuple(rank.tensors[name].shape) for name in names] == list(shapes):
            return names
    raise _unfit(
        rank.path, f"has an optimizer group {number} of {len(shapes)} tensors that do not match the parameters"
    )


def _flat(rank: Rank, path: Path) -> dict[str, dict[str, Part]]:
    """Return main parameters and moments of a rank from the distributed optimizer's file.

    Its buffers hold the parameters of a model chunk in reverse order, each aligned to 64 elements. Where the padding
    lies depends on bucket sizes that the file does not say, so only buffers without any are read.
    """
    content = read_torch_file(path)
    if isinstance(content, (list, tuple)) and len(content) == 1:
        content = content[0]
    if not isinstance(content, Mapping) or not content.get("buckets_coalesced"):
        raise _unfit(path, "has optimizer state with one tensor a bucket; only coalesced buckets can be read")
    found: dict[str, dict[str, Part]] = {}
    for number, names in enumerate(rank.chunks):
        buffers = list(dict(content.get(number) or {}).values())
        if len(buffers) != 1:
            raise _unfit(path, f"has {len(buffers)} buffers of model chunk {number} instead of one")
        sizes = {name: prod(rank.tensors[name].shape) for name in names}
        for theirs, kind in _DISTRIBUTED_KINDS.items():
            flat = buffers[0].get(theirs)
            if not isinstance(flat, Tensor) or flat.numel() != sum(sizes.values()):
                size = flat.numel() if isinstance(flat, Tensor) else "no"
                raise _unfit(
                    path, f"has {size:,} elements of {theirs} for a model with {sum(sizes.values()):,} parameters"
                )
            flat, begin = flat.view(-1), 0
            for name in reversed(names):
                part = flat[begin : begin + sizes[name]].view(rank.tensors[name].shape)
                found.setdefault(kind, {})[name] = mapped(part, str(path))
                begin += sizes[name]
    return found


def _steps(inner: Mapping[str, Any]) -> set[int]:
    """Return the counts of steps: torch keeps one for each tensor, Apex one for each group."""
    entries = [*inner["param_groups"], *dict(inner.get("state") or {}).values()]
    return {int(entry["step"]) for entry in entries if entry.get("step") is not None}


def _scaler(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the loss scaler's state; a constant one has none."""
    scaler = (state or {}).get("grad_scaler")
    if not isinstance(scaler, Mapping) or "growth_tracker" not in scaler:
        return {"kind": "constant"}
    return {
        "kind": "megatron",
        "scale": float(scaler["scale"]),
        "growth_tracker": int(scaler["growth_tracker"]),
        "hysteresis_tracker": int(scaler["hysteresis_tracker"]),
    }


def _unfit(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}",
        rule="Only the optimizer state of Adam, for all parameters of the model, can be imported",
        fix=WEIGHTS_ONLY,
    )
