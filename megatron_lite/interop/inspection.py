"""Checkpoint inspection library: content summary and tensor comparison of native and foreign formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.names import is_weight
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.sources import TensorSource
from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.errors import CheckpointError, MegatronLiteError
from megatron_lite.formatting import format_size
from megatron_lite.interop.export import Weights
from megatron_lite.interop.importing import ImportOptions, open_foreign
from megatron_lite.interop.megatron.assemble import facts_of
from megatron_lite.interop.megatron.flags import read_model_flags
from megatron_lite.interop.megatron.opening import MegatronOptions, read_found
from megatron_lite.interop.megatron.shards import RawTensors
from megatron_lite.interop.megatron.state_dicts import plain_value
from megatron_lite.interop.safetensors_writer import size_of
from megatron_lite.interop.sources import open_hugging_face, read_json
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.foreign import Kind, Recognised


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
        return _summarize_megatron(found)
    tensors, config = open_hugging_face(found.folder), read_json(found.folder / "config.json")
    try:
        open_foreign(found, ImportOptions())
        importable = "yes"
    except MegatronLiteError as error:
        importable = f"no: {error.problem}. {error.fix}"
    rows = {
        "kind": found.title,
        "architecture": ", ".join(config.get("architectures") or [str(config.get("model_type"))]),
        **_tensor_rows(tensors),
        "can be imported": importable,
    }
    return Summary(rows, tensors, config)


def _summarize_megatron(found: Recognised) -> Summary:
    """Read a checkpoint of Megatron-LM or DeepSpeed; what its files do not say is shown as what an import asks for."""
    content = read_found(found, MegatronOptions(weights_only=True))
    raw = RawTensors(content.raw)
    try:
        open_foreign(found, ImportOptions(megatron=MegatronOptions(weights_only=True)))
        importable = "yes"
    except MegatronLiteError as error:
        importable = f"no: {error.problem}. {error.fix}"
    rows = {"kind": found.title, **facts_of(content), **_tensor_rows(raw), "can be imported": importable}
    return Summary(rows, raw, {name: plain_value(value) for name, value in (content.arguments or {}).items()})


def says_vocabulary(found: Recognised | None) -> bool:
    """Return whether checkpoints of a kind state the vocabulary without padding; None: megatron_lite's own kind."""
    return found is None or found.kind is Kind.HUGGING_FACE


def comparable(path: Path, found: Recognised | None, options: ImportOptions, vocab_size: int = 0) -> Comparable:
    """Return a checkpoint of any kind under megatron_lite's names.

    Args:
        path: the folder that was given.
        found: the foreign checkpoint in it; None: it holds one of megatron_lite.
        options: what the command line says of foreign checkpoints; flags of the model count for those of Megatron-LM
            and DeepSpeed only.
        vocab_size: size of the vocabulary, for a Megatron-LM or DeepSpeed checkpoint that does not say it; 0: the
            other one does not say it either, and padding is compared as well.

    Raises:
        CheckpointError: it cannot be imported, or holds no model.
    """
    if found is not None:
        chosen = replace(options, megatron=_without_padding(found, options.megatron, vocab_size))
        foreign = open_foreign(found, chosen)
        return Comparable(found.folder, _fields(asdict(foreign.model)), foreign.tensors)
    checkpoint = find_checkpoint(str(path))
    if checkpoint is None:
        raise CheckpointError(
            f"{path} contains no checkpoint",
            fix="Give the --save folder of a run, or a folder that `megatron-lite import` reads",
        )
    reader = CheckpointReader(checkpoint)
    names = [name for name in reader.tensors if is_weight(name)]
    model = asdict(stored_model(reader.manifest, checkpoint).model)
    return Comparable(checkpoint, _fields(model), Weights(reader, names, None))


def _without_padding(found: Recognised, options: MegatronOptions, vocab_size: int) -> MegatronOptions:
    if found.kind is Kind.HUGGING_FACE:
        return MegatronOptions()
    options = replace(options, weights_only=True, padded=True)
    is_known = "vocab_size" in read_model_flags(options.flags).model or read_found(found, options).vocab_size
    if is_known or not vocab_size:
        return options
    return replace(options, flags=(*options.flags, "--vocab-size", str(vocab_size)))


def _fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields but for padding, which depends on the layout."""
    return {name: value for name, value in model.items() if "vocab_size_divisible" not in name and "padded" not in name}


def _tensor_rows(source: TensorSource) -> dict[str, str]:
    infos = source.tensors.values()
    dtypes = Counter(info.dtype for info in infos)
    return {
        "tensors": f"{len(source.tensors):,}, {' and '.join(sorted(dtypes))}",
        "parameters": f"{sum(prod(info.shape) for info in infos):,}",
        "size": format_size(size_of(source.tensors)),
    }
