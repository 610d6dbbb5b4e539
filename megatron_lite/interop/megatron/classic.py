"""Reader of Megatron-LM classic checkpoints: mp_rank_XX[_YYY]/model_optim_rng.pt of every version, any tp and pp."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron import adam
from megatron_lite.interop.megatron.arrangements import CURRENT_VERSION
from megatron_lite.interop.megatron.found import Found
from megatron_lite.interop.megatron.naming import LEGACY, Scheme, detect, split_layer
from megatron_lite.interop.megatron.shards import Part, mapped
from megatron_lite.interop.megatron.state_dicts import (
    arguments_of,
    flatten,
    mapping_of,
    original_vocab_size,
    scheduler_of,
    version_of,
)
from megatron_lite.interop.unpickling import read_torch_file

FILE = "model_optim_rng.pt"
DISTRIBUTED_OPTIMIZER_FILE = "distrib_optim.pt"
_MODEL_FILES = (FILE, "model_rng.pt")
"""The second was written beside a distributed optimizer's own files for a while."""
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model(\d*)")


@dataclass(frozen=True, eq=False)
class Rank:
    """File of one model-parallel rank.

    Attributes:
        tp: tensor-parallel rank.
        pp: pipeline stage.
        path: the file.
        content: what it holds.
        chunks: of each model chunk the canonical names of its tensors in their order, layers numbered over the
            whole model.
        tensors: the tensors, by these names.
    """

    tp: int
    pp: int
    path: Path
    content: Mapping[str, Any]
    chunks: Sequence[Sequence[str]] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all chunks' tensors in the order in which their parameters were registered."""
        return [name for chunk in self.chunks for name in chunk]


def read_classic(folder: Path, *, version: float | None = None, with_optimizer: bool = True) -> Found:
    """Read a classic checkpoint's files but for the values of their tensors.

    Args:
        folder: iter_…, release, or what else holds the mp_rank folders.
        version: checkpoint version, where the files do not say it.
        with_optimizer: whether the optimizer's state is wanted.

    Raises:
        CheckpointError: a file is missing or damaged, or the files are not of one checkpoint.
    """
    without = () if with_optimizer else ("optimizer",)
    ranks = [Rank(tp, pp, path, mapping_of(read_torch_file(path, without), path)) for (tp, pp), path in _files(folder)]
    first = ranks[0]
    where = str(first.path)
    arguments = arguments_of(first.content)
    _check_layout(folder, ranks, arguments)
    for rank in ranks:
        _check_same(first, rank)
    ranks, num_layers = _numbered(ranks)
    scheme = detect(name for rank in ranks for name in rank.names)
    # Core names came with version 3.0; files of version 0 do not say it.
    found_version = version_of(first.content, where, version, 0.0 if scheme is LEGACY else CURRENT_VERSION)
    if scheme is not LEGACY and found_version < 2:
        raise CheckpointError(
            f"{where} has the tensor names of megatron-core, but checkpoint_version {found_version:g}",
            rule="megatron-core writes checkpoints of version 3.0",
            fix="Remove --checkpoint-version"
            if version is not None
            else "Convert the original checkpoint again (Megatron-LM's tools/checkpoint/convert.py): this file has a "
            "wrong version",
        )
    parts, head_copy = _joined(ranks, scheme)
    notes: list[str] = []
    state = adam.read_adam(ranks, folder, notes) if with_optimizer else None
    return Found(
        folder=folder,
        where=where,
        scheme=scheme,
        parts=parts,
        num_layers=num_layers,
        arguments=arguments,
        iteration=int(first.content.get("iteration") or 0),
        raw={f"{rank.path.parent.name}: {name}": part for rank in ranks for name, part in _raw(rank)},
        version=found_version,
        vocab_size=original_vocab_size(first.content, arguments),
        head_copy=head_copy,
        adam=state,
        scheduler=scheduler_of(first.content),
        content=first.content,
        notes=notes,
    )


def _files(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    """Return the file of every (tp, pp), in the order of pp, then tp."""
    found: dict[tuple[int, int], Path] = {}
    for entry in folder.iterdir():
        match = _RANK.fullmatch(entry.name)
        if match is None:
            continue
        if match[3] is not None:
            raise CheckpointError(
                f"{entry} is of an expert-parallel run, and mixture of experts is not supported",
                fix="Import a model without experts",
            )
        key = (int(match[1]), int(match[2] or 0))
        there = [entry / name for name in _MODEL_FILES if (entry / name).is_file()]
        if not there or key in found:
            raise CheckpointError(
                f"{entry} does not contain {FILE}"
                if not there
                else f"{entry} and {found[key].parent} are of the same model-parallel rank",
                fix="Copy the checkpoint folder again"
                if not there
                else "Delete the one that is not of this checkpoint",
            )
        found[key] = there[0]
    return sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))


def _check_layout(folder: Path, ranks: Sequence[Rank], arguments: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint that lacks a rank's file."""
    args = arguments or {}
    tp = max(rank.tp for rank in ranks) + 1
    pp = max(rank.pp for rank in ranks) + 1
    tp = max(tp, args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or 1)
    pp = max(pp, args.get("pipeline_model_parallel_size") or 1)
    there = {(rank.tp, rank.pp) for rank in ranks}
    for stage in range(pp):
        for number in range(tp):
            if (number, stage) not in there:
                name = f"mp_rank_{number:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                raise CheckpointError(
                    f"{folder / name / FILE} is missing (the checkpoint has tensor-parallel size {tp} and "
                    f"pipeline-parallel size {pp})",
                    fix="Copy this file, too",
                )


def _check_same(first: Rank, rank: Rank) -> None:
    """Refuse files of different checkpoints."""
    for name in ("iteration", "checkpoint_version"):
        if first.content.get(name) != rank.content.get(name):
            raise CheckpointError(
                f"The files are of different checkpoints: {name} is {first.content.get(name)} in {first.path}, and "
                f"{rank.content.get(name)} in {rank.path}",
                fix="Copy the folder again from one checkpoint",
            )


def chunks_of(rank: Rank) -> list[Mapping[str, Any]]:
    """Return the state dicts of a rank's model chunks: `model`, or model0, model1, … of an interleaved pipeline."""
    found = {int(match[1] or 0): value for name, value in rank.content.items() if (match := _CHUNK.fullmatch(name))}
    chunks = [found[number] for number in sorted(found) if isinstance(found[number], Mapping)]
    if not chunks or sorted(found) != list(range(len(chunks))):
        raise CheckpointError(
            f"{rank.path} contains no model, but {', '.join(map(str, rank.content)) or 'nothing'}",
            fix="Give the checkpoint of a GPT that Megatron-LM saved",
        )
    return chunks


def _numbered(ranks: Sequence[Rank]) -> tuple[list[Rank], int]:
    """Return the ranks with their tensors, layers numbered over the whole model, and the number of layers.

    Chunk 0 of all stages comes first, then chunk 1 of all stages, and so on (interleaved schedule).
    """
    chunks = {(rank.tp, rank.pp): [list(flatten(chunk, rank.path)) for chunk in chunks_of(rank)] for rank in ranks}
    stages = sorted({rank.pp for rank in ranks})
    counts = {len(chunks[key]) for key in chunks}
    if len(counts) > 1:
        raise CheckpointError(
            f"The files in {ranks[0].path.parent.parent} are of different checkpoints: some ranks have {min(counts)} "
            "model chunks, "
            f"others {max(counts)}",
            fix="Copy the folder again from one checkpoint",
        )
    begin, total = {}, 0
    for chunk in range(counts.pop()):
        for stage in stages:
            begin[stage, chunk] = total
            sizes = {rank.path: _layers(chunks[rank.tp, stage][chunk], rank) for rank in ranks if rank.pp == stage}
            if len(set(sizes.values())) > 1:
                counted = ", ".join(f"{size} in {path}" for path, size in sizes.items())
                raise CheckpointError(
                    "The files are of different checkpoints: tensor-parallel ranks of one stage have different "
                    "numbers of layers "
                    f"({counted})",
                    fix="Copy the folder again from one checkpoint",
                )
            total += next(iter(sizes.values()))
    numbered = []
    for rank in ranks:
        named = [
            {_renumbered(name, begin[rank.pp, number]): tensor for name, tensor in chunk}
            for number, chunk in enumerate(chunks[rank.tp, rank.pp])
        ]
        tensors = {name: tensor for chunk in named for name, tensor in chunk.items()}
        numbered.append(replace(rank, chunks=tuple(map(tuple, named)), tensors=tensors))
    return numbered, total


def _layers(chunk: Sequence[tuple[str, Tensor]], rank: Rank) -> int:
    """Return how many layers a chunk has; their local numbers must be 0, 1, …."""
    numbers = {layer[1] for name, _ in chunk if (layer := split_layer(name))}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(
            f"The layers of a pipeline stage should be numbered from 0, but {rank.path} has the layers "
            f"{', '.join(map(str, sorted(numbers)))}",
            fix="Copy the folder again, or save the checkpoint again with Megatron-LM (--ckpt-format torch)",
        )
    return len(numbers)


def _renumbered(name: str, begin: int) -> str:
    layer = split_layer(name)
    return name if layer is None else f"{layer[0]}.{layer[1] + begin}.{layer[2]}"


def _joined(ranks: Sequence[Rank], scheme: Scheme) -> tuple[dict[str, list[Part]], list[Part] | None]:
    """Return every tensor's parts in the order of tensor-parallel ranks, and the last stage's copy of the head.

    The embedding's table can lie on the last stage as well; the first stage's is taken.
    """
    by_name: dict[tuple[str, int], list[Part]] = {}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            by_name.setdefault((name, rank.pp), []).append(mapped(tensor, str(rank.path)))
    tp = max(rank.tp for rank in ranks) + 1
    parts: dict[str, list[Part]] = {}
    copy = None
    for (name, stage), found in by_name.items():
        if len(found) != tp:
            files = [str(rank.path) for rank in ranks if rank.pp == stage]
            lacking = [path for path in files if path not in {part.where for part in found}]
            raise CheckpointError(
                f"The files are of different checkpoints: {found[0].where} has the tensor {name}, and "
                + (f"{', '.join(lacking)} lacks it" if lacking else f"only {len(found)} of {tp} ranks have it"),
                fix=f"Copy {Path(files[0]).parents[1]} again, all files from one checkpoint",
            )
        if name in scheme.head_copies:
            copy = found
        elif name in parts:
            raise CheckpointError(
                f"The files are of different checkpoints: the tensor {name} is on two pipeline stages, in "
                f"{parts[name][0].where} and "
                f"in {found[0].where}",
                fix="Copy the folder again from one checkpoint",
            )
        else:
            parts[name] = found
    return parts, copy


def _raw(rank: Rank) -> Iterator[tuple[str, Part]]:
    """Yield the model's tensors of a rank under their own names, and the optimizer's."""
    for number, chunk in enumerate(chunks_of(rank)):
        prefix = "model" if "model" in rank.content else f"model{number}"
        for name, tensor in flatten(chunk, rank.path):
            yield f"{prefix}.{name}", mapped(tensor, str(rank.path))
    for name, tensor in adam.tensors_within(rank.content.get("optimizer"), "optimizer"):
        yield name, mapped(tensor, str(rank.path))
