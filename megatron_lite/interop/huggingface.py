"""Hugging Face folder reader: validates config, tokenizer and weights; tensors under megatron_lite's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.sources import TensorInfo, TensorSource, compare_sources
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS, parameter_shapes
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.architectures.base import Architecture
from megatron_lite.interop.architectures.keys import ConfigKeys
from megatron_lite.interop.architectures.registry import architecture_of_config
from megatron_lite.interop.foreign import ForeignModel
from megatron_lite.interop.mapping import ImportedTensors
from megatron_lite.interop.sources import open_hugging_face, read_json
from megatron_lite.interop.tokenizer_files import find_tokenizer
from megatron_lite.rectangle import Rectangle
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer

LONGEST = 4096
"""Default of seq_length: evaluation uses it, and a model of 131,072 positions would need too much memory."""


def open_model(
    folder: Path, *, seq_length: int = 0, ignored_keys: Collection[str] = (), dtype: torch.dtype | None = None
) -> ForeignModel:
    """Read a Hugging Face folder's config, tokenizer and tensor headers.

    Args:
        folder: the model's folder.
        seq_length: the longest sequence that is wanted; 0: all of the model's positions.
        ignored_keys: unknown keys of config.json that may be ignored.
        dtype: what the weights are converted to; None: as they are.

    Raises:
        CheckpointError: the architecture or a setting is not supported, a file or tensor is missing, damaged or of
            another shape, or the tokenizer has more tokens than the vocabulary.
        DataError: the tokenizer does not load.
    """
    keys = ConfigKeys(read_json(folder / "config.json"), folder / "config.json", seq_length)
    architecture = architecture_of_config(keys)
    model = architecture.read_config(keys)
    rows = keys.number("vocab_size", default=model.vocab_size)
    keys.finish(ignored_keys)
    if model.position_embedding == "learned" and seq_length > model.max_position_embeddings:
        raise CheckpointError(
            f"--seq-length {seq_length} is longer than the table of {model.max_position_embeddings} learned positions "
            f"in {folder}",
            fix=f"Use --seq-length {model.max_position_embeddings} or less",
        )
    settings = find_tokenizer(folder)
    notes: list[str] = []
    if settings is not None:
        model = replace(model, vocab_size=_vocabulary(build_tokenizer(settings), rows, folder, notes))
    raw = open_hugging_face(folder)
    source = _with_prefix(raw, architecture)
    if model.tied_embeddings and architecture.head in source.tensors:
        source = _without_copy(source, architecture, model, rows, folder)
    tensors = ImportedTensors(
        source, architecture.entries(model, rows), parameter_shapes(model), folder, architecture.ignored, dtype
    )
    found = dtype or getattr(torch, tensors.tensors[WORD_EMBEDDINGS].dtype)
    length = seq_length or min(model.max_position_embeddings, LONGEST)
    return ForeignModel(model, tensors, raw, settings, found, length, tuple(notes))


def _vocabulary(tokenizer: Tokenizer, rows: int, folder: Path, notes: list[str]) -> int:
    size = tokenizer.vocab_size
    if size > rows:
        raise CheckpointError(
            f"The tokenizer in {folder} has {size:,} tokens, more than the model's vocabulary (vocab_size={rows} in "
            "config.json)",
            fix="Replace the tokenizer files in the folder by those with which the model was trained",
        )
    if size < rows:
        notes.append(
            f"the tokenizer has {size} tokens: the {rows - size} rows of the vocabulary after them are left out"
        )
    return size


class _Renamed:
    """A source whose names are others."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = names
        self._tensors = {new: source.tensors[old] for new, old in names.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        return self._source.read(self._names[name], rectangle)


def _with_prefix(source: TensorSource, architecture: Architecture) -> TensorSource:
    """Return the source with the names of the whole model: files of the model without its head lack a prefix."""
    if any(name.startswith(architecture.prefix) for name in source.tensors):
        return source
    names = {name if name == architecture.head else architecture.prefix + name: name for name in source.tensors}
    return _Renamed(source, names)


def _without_copy(
    source: TensorSource, architecture: Architecture, model: ModelConfig, rows: int, folder: Path
) -> TensorSource:
    """Return the source without its copy of a tied head, which must be equal to the embedding."""
    (entry,) = (entry for entry in architecture.entries(model, rows) if entry.ours == WORD_EMBEDDINGS)
    both = (_Renamed(source, {"head": name}) for name in (architecture.head, entry.theirs[0]))
    difference = next(compare_sources(*both), None)
    if difference is None or not difference.equal:
        raise CheckpointError(
            f"config.json in {folder} has tie_word_embeddings=true, but the weights {architecture.head} and "
            f"{entry.theirs[0]} "
            "differ",
            fix='Set "tie_word_embeddings": false in config.json if the model has an output layer of its own; '
            "otherwise "
            "download the weights again",
        )
    return _Renamed(source, {name: name for name in source.tensors if name != architecture.head})


def describe_config(model: ModelConfig, architecture: Architecture, positions: int, **more: Any) -> dict[str, Any]:
    """Return the content of config.json for an export.

    Args:
        model: the model.
        architecture: the class.
        positions: the longest sequence.
        more: keys that do not follow from the model (dtype, token ids).
    """
    content = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **architecture.write_config(model, positions),
        **more,
    }
    return dict(sorted(content.items()))
