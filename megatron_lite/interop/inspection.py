"""Inspection of foreign checkpoints and comparison across kinds, for `checkpoint inspect` and `checkpoint diff`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.names import OPTIMIZER_PREFIX
from megatron_lite.checkpoint.offline import TensorSource
from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.export import Weights
from megatron_lite.interop.importing import ImportOptions, open_foreign
from megatron_lite.interop.safetensors_writer import size_of
from megatron_lite.interop.sources import open_hugging_face, read_json
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.foreign import Kind, Recognised
from megatron_lite.runs.manifest import read_manifest, size_text


@dataclass(frozen=True, eq=False)
class Summary:
    """A foreign checkpoint as `checkpoint inspect` shows it.

    Attributes:
        rows: facts by name.
        tensors: its tensors under their own names.
        config: what it says of itself, as JSON values.
    """

    rows: Mapping[str, str]
    tensors: TensorSource
    config: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Comparable:
    """A checkpoint of any kind as `checkpoint diff` compares it with one of another kind.

    Attributes:
        path: its folder.
        model: fields of ModelConfig.
        tensors: its weights under our names.
    """

    path: Path
    model: Mapping[str, Any]
    tensors: TensorSource


def summarize(found: Recognised) -> Summary:
    """Read what a foreign checkpoint holds; whether it can be imported is one of the facts.

    Raises:
        CheckpointError: its files are missing or damaged.
    """
    if found.kind is not Kind.HUGGING_FACE:
        foreign = open_foreign(found, ImportOptions())
        rows = {"kind": found.title, "iteration": f"{foreign.iteration:,}", **_tensor_rows(foreign.raw)}
        return Summary(rows, foreign.raw, asdict(foreign.model))
    tensors, config = open_hugging_face(found.folder), read_json(found.folder / "config.json")
    try:
        open_foreign(found, ImportOptions())
        importable = "yes"
    except CheckpointError as error:
        importable = f"no: {error.found}"
    rows = {
        "kind": found.title,
        "architecture": ", ".join(config.get("architectures") or [str(config.get("model_type"))]),
        **_tensor_rows(tensors),
        "can be imported": importable,
    }
    return Summary(rows, tensors, config)


def comparable(path: Path, found: Recognised | None) -> Comparable:
    """Return a checkpoint of any kind under our names; None: it is one of ours.

    Raises:
        CheckpointError: it cannot be imported, or holds no model.
    """
    if found is not None:
        foreign = open_foreign(found, ImportOptions())
        return Comparable(found.folder, _fields(asdict(foreign.model)), foreign.tensors)
    checkpoint = find_checkpoint(str(path))
    if checkpoint is None:
        raise CheckpointError("There must be a checkpoint", found=f"{path} holds none", fix="Give another folder")
    manifest = read_manifest(checkpoint)
    names = [name for name in manifest.tensors if not name.startswith(OPTIMIZER_PREFIX)]
    model = asdict(stored_model(manifest, checkpoint).model)
    return Comparable(checkpoint, _fields(model), Weights(checkpoint, manifest, names, None))


def _fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields but for padding, which depends on the layout."""
    return {name: value for name, value in model.items() if "vocab_size_divisible" not in name and "padded" not in name}


def _tensor_rows(source: TensorSource) -> dict[str, str]:
    infos = source.tensors.values()
    dtypes = Counter(info.dtype for info in infos)
    return {
        "tensors": f"{len(source.tensors):,}, {' and '.join(sorted(dtypes))}",
        "parameters": f"{sum(prod(info.shape) for info in infos):,}",
        "size": size_text(size_of(source.tensors)),
    }
