"""Reader of DeepSpeed checkpoints of Megatron-DeepSpeed: pipeline layer files, or a module file of each rank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.interop.megatron.arrangements import CURRENT_VERSION
from megatron_lite.interop.megatron.found import AdamState, Found
from megatron_lite.interop.megatron.naming import (
    DEEPSPEED,
    EMBEDDING_FILE,
    FIRST_LAYER_FILE,
    LEGACY,
    Scheme,
    final_norm_file,
    split_layer,
)
from megatron_lite.interop.megatron.shards import Part, mapped
from megatron_lite.interop.megatron.state_dicts import (
    arguments_of,
    flatten,
    mapping_of,
    original_vocab_size,
    scheduler_of,
    version_of,
)
from megatron_lite.interop.megatron.zero import read_zero
from megatron_lite.interop.unpickling import read_torch_file

_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_STEP = re.compile(r"global_step(\d+)")


@dataclass(frozen=True, eq=False)
class RankFiles:
    """mp_rank_XX_model_states.pt of every model-parallel rank; the number is pipeline stage * tp + tp rank."""

    contents: Mapping[int, Mapping[str, Any]]
    paths: Mapping[int, Path]

    @property
    def first(self) -> Mapping[str, Any]:
        """Content of rank 0's file; empty: there is none."""
        return self.contents.get(0, {})

    @property
    def arguments(self) -> Mapping[str, Any] | None:
        """The args; None: there are none."""
        return arguments_of(self.first)


def read_rank_files(folder: Path) -> RankFiles:
    """Read the mp_rank files of a folder.

    Raises:
        CheckpointError: one is damaged, or they are of different saves.
    """
    paths = {int(match[1]): entry for entry in sorted(folder.iterdir()) if (match := _RANK.fullmatch(entry.name))}
    contents = {number: mapping_of(read_torch_file(path), path) for number, path in paths.items()}
    for number, content in contents.items():
        if 0 in contents and content.get("iteration") != contents[0].get("iteration"):
            raise CheckpointError(
                f"The files are of different checkpoints: iteration is {contents[0].get('iteration')} in {paths[0]}, "
                "and "
                f"{content.get('iteration')} in {paths[number]}",
                fix="Copy the folder again from one checkpoint",
            )
    return RankFiles(contents, paths)


def iteration_of_step(folder: Path, ranks: RankFiles) -> int:
    """Return the iteration: what the files say, else the folder's name."""
    for name in ("iteration", "global_steps"):
        if isinstance(ranks.first.get(name), int):
            return int(ranks.first[name])
    match = _STEP.match(folder.name)
    return int(match[1]) if match else 0


def read_deepspeed(folder: Path, *, version: float | None = None, with_optimizer: bool = True) -> Found:
    """Read a DeepSpeed checkpoint's files but for the values of their tensors.

    Args:
        folder: global_stepN.
        version: checkpoint version, where the files do not say it.
        with_optimizer: whether the optimizer's state is wanted.

    Raises:
        CheckpointError: a file is missing or damaged, or the files are not of one checkpoint.
    """
    ranks = read_rank_files(folder)
    files = {
        (int(match[1]), int(match[2])): entry
        for entry in sorted(folder.iterdir())
        if (match := _LAYER.fullmatch(entry.name))
    }
    scheme = DEEPSPEED if files else LEGACY
    by_rank = _layer_tensors(folder, files, ranks) if files else _module_tensors(folder, ranks)
    parts = _joined(by_rank)
    num_layers = _num_layers(parts, scheme)
    notes: list[str] = []
    adam: AdamState | None = None
    if with_optimizer:
        adam = read_zero(folder, ranks.contents, len(by_rank), notes)
    where = str(ranks.paths.get(0, folder))
    raw = {
        f"{Path(path).name}: {name.partition('.')[2] if files else name}": mapped(tensor, path)
        for tensors in by_rank
        for name, (tensor, path) in tensors.items()
    }
    return Found(
        folder=folder,
        where=where,
        scheme=scheme,
        parts=parts,
        num_layers=num_layers,
        arguments=ranks.arguments,
        iteration=iteration_of_step(folder, ranks),
        raw=raw,
        version=version_of(ranks.first, where, version, CURRENT_VERSION),
        vocab_size=original_vocab_size(ranks.first, ranks.arguments),
        adam=adam,
        scheduler=scheduler_of(ranks.first),
        content=ranks.first,
        notes=notes,
    )


def _layer_tensors(
    folder: Path, files: Mapping[tuple[int, int], Path], ranks: RankFiles
) -> list[dict[str, tuple[Tensor, str]]]:
    """Return the tensors of each tensor-parallel rank's layer files, named by the file's number.

    Raises:
        CheckpointError: a layer file is missing, or there is one too many.
    """
    args = ranks.arguments or {}
    tp = max(args.get("tensor_model_parallel_size") or 1, 1 + max(rank for _, rank in files))
    numbers = {number for number, _ in files}
    layers = args.get("num_layers") or max(numbers) - final_norm_file(0)
    expected = [EMBEDDING_FILE, *range(FIRST_LAYER_FILE, FIRST_LAYER_FILE + layers), final_norm_file(layers)]
    missing = [(number, rank) for number in expected for rank in range(tp) if (number, rank) not in files]
    if missing:
        number, rank = missing[0]
        raise CheckpointError(
            f"{folder / _layer_name(number, rank)} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f" (the checkpoint has {layers} layers and tensor-parallel size {tp})",
            fix="Copy this file, too" if len(missing) == 1 else "Copy the folder again",
        )
    left = sorted(numbers - set(expected))
    if left:
        raise CheckpointError(
            f"{folder / _layer_name(left[0], 0)} does not belong to a model with {layers} layers",
            rule=f"{folder} contains files of different models",
            fix="Copy the files of one model from where they were saved into an empty folder, and import that",
        )
    by_rank: list[dict[str, tuple[Tensor, str]]] = [{} for _ in range(tp)]
    for (number, rank), path in files.items():
        content = mapping_of(read_torch_file(path), path)
        for name, tensor in flatten(content, path):
            by_rank[rank][f"{number}.{name}"] = (tensor, str(path))
    return by_rank


def _module_tensors(folder: Path, ranks: RankFiles) -> list[dict[str, tuple[Tensor, str]]]:
    """Return the tensors of each rank's `module`, of a run without a pipeline.

    Raises:
        CheckpointError: there is none.
    """
    by_rank = []
    count = max([(ranks.arguments or {}).get("tensor_model_parallel_size") or 1, *(n + 1 for n in ranks.contents)])
    for number in range(count):
        module = ranks.contents.get(number, {}).get("module")
        if not isinstance(module, Mapping):
            raise CheckpointError(
                f"{folder} has no weights: there are no files layer_…, and mp_rank_{number:02d}_model_states.pt "
                + ("has no entry module" if number in ranks.contents else "is missing"),
                fix="Copy the whole checkpoint folder again",
            )
        path = ranks.paths[number]
        by_rank.append({name: (tensor, str(path)) for name, tensor in flatten(module, path)})
    return by_rank


def _layer_name(number: int, rank: int) -> str:
    return f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def _joined(by_rank: Sequence[Mapping[str, tuple[Tensor, str]]]) -> dict[str, list[Part]]:
    parts = {}
    for name in by_rank[0]:
        lacking = next((tensors for tensors in by_rank if name not in tensors), None)
        if lacking is not None:
            raise CheckpointError(
                f"The files are of different checkpoints: the tensor {name.partition('.')[2]} is in "
                f"{by_rank[0][name][1]}, but not in "
                "the file of another tensor-parallel rank",
                fix="Copy the folder again from one checkpoint",
            )
        parts[name] = [mapped(*tensors[name]) for tensors in by_rank]
    for tensors in by_rank[1:]:
        more = sorted(tensors.keys() - parts.keys())
        if more:
            raise CheckpointError(
                f"The files are of different checkpoints: the tensor {more[0].partition('.')[2]} is in "
                f"{tensors[more[0]][1]}, but not "
                "in the file of another tensor-parallel rank",
                fix="Copy the folder again from one checkpoint",
            )
    return parts


def _num_layers(parts: Mapping[str, Sequence[Part]], scheme: Scheme) -> int:
    if scheme is LEGACY:
        return len({layer[1] for name in parts if (layer := split_layer(name))})
    return max(int(name.partition(".")[0]) for name in parts) - final_norm_file(0)
