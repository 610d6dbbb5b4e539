"""Export of a checkpoint as a Hugging Face model: config, tokenizer, safetensors, model card; logits are compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.load import averages
from megatron_lite.checkpoint.names import source_of
from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.sources import TensorInfo
from megatron_lite.checkpoint.stored_model import StoredModel, require_tokenizer, stored_model
from megatron_lite.config.data import DataConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS, parameter_shapes
from megatron_lite.config.record import from_record
from megatron_lite.errors import CheckpointError, MegatronLiteError
from megatron_lite.formatting import format_shape
from megatron_lite.interop.architectures.base import Architecture
from megatron_lite.interop.architectures.registry import architecture_for
from megatron_lite.interop.huggingface import describe_config
from megatron_lite.interop.mapping import ExportedTensors, ImportedTensors
from megatron_lite.interop.modeling_files import FOLDER
from megatron_lite.interop.output_folder import check_output, new_folder
from megatron_lite.interop.safetensors_writer import size_of, write_safetensors
from megatron_lite.interop.streamed_logits import streamed_logits
from megatron_lite.interop.tokenizer_files import special_ids, write_tokenizer
from megatron_lite.interop.verify import TOLERANCE, Verification, require_transformers, sample_tokens, verify_logits
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.manifest import Manifest
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer
from megatron_lite.tokenizer.null import NullTokenizer

SHARD_SIZE = 5 * 10**9
_SPARE = 64 << 20
"""Bytes beside the weights: tokenizer, config, model card."""

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        architecture: the class; empty: the first that can express the model.
        dtype: of the weights; None: as they were saved.
        averaged: export the moving average of the weights.
        max_shard_size: bytes of a weights file at most.
        tokenizer: fields of TokenizerConfig that replace the manifest's; None: the tokenizer is left out.
        verify: whether the logits are compared with transformers'.
        tolerance: see verify.TOLERANCE.
    """

    architecture: str = ""
    dtype: torch.dtype | None = None
    averaged: bool = False
    max_shard_size: int = SHARD_SIZE
    tokenizer: Mapping[str, Any] | None = field(default_factory=dict)
    verify: bool = True
    tolerance: float = TOLERANCE


class Weights:
    """Weights of a checkpoint as a TensorSource: for fp32, the main parameters where these were saved.

    Args:
        reader: of the checkpoint.
        names: of the weights.
        dtype: in which they are wanted.
        averaged: take the moving averages of the weights.

    Raises:
        CheckpointError: there are no averages.
    """

    def __init__(
        self, reader: CheckpointReader, names: Sequence[str], dtype: torch.dtype | None, *, averaged: bool = False
    ) -> None:
        self._reader = reader
        of_average = averages(reader) if averaged else {}
        found = {
            name: source_of(of_average.get(name, name), dtype == torch.float32, reader.manifest.tensors)
            for name in names
        }
        self._sources = {name: source for name, source in found.items() if source is not None}
        self._tensors = {name: reader.tensors[source] for name, source in self._sources.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every weight by the parameter's name."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a weight."""
        return self._reader.read(self._sources[name], rectangle)


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """An export whose every precondition holds."""

    path: Path
    """The checkpoint's folder."""
    manifest: Manifest
    stored: StoredModel
    architecture: Architecture
    weights: Weights
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    options: ExportOptions

    @property
    def positions(self) -> int:
        """The longest sequence that config.json states."""
        model = self.stored.model
        if model.position_embedding == "learned":
            return model.max_position_embeddings
        return max(model.max_position_embeddings, self.stored.seq_length)

    @property
    def data(self) -> DataConfig:
        """The run's data; empty: the manifest has none."""
        try:
            return from_record(DataConfig, self.manifest.provenance.config.get("data", {}))
        except MegatronLiteError:  # another version's: only the choice of a sample text depends on it
            return DataConfig()


@dataclass(frozen=True)
class ExportReport:
    """Result of an export."""

    path: Path
    files: tuple[str, ...]
    size: int
    verification: Verification | None


def plan_export(load: str, iteration: int, options: ExportOptions) -> ExportPlan:
    """Check everything that an export needs, before any work.

    Args:
        load: a run's --save folder, or one checkpoint in it.
        iteration: which one; 0: the latest.
        options: see ExportOptions.

    Raises:
        CheckpointError: there is no checkpoint, or it lacks a weight, has one of another shape, or has no average.
        ConfigError: no class can express the model, its tokenizer is another one, or transformers is not installed.
        DataError: the tokenizer's files are missing.
    """
    path = checkpoint_to_export(load, iteration)
    if options.verify:
        require_transformers("export")
    reader = CheckpointReader(path)
    manifest = reader.manifest
    stored = stored_model(manifest, path)
    architecture = architecture_for(stored.model, options.architecture)
    tokenizer = _tokenizer(stored, manifest, path, options)
    shapes = parameter_shapes(stored.model)
    weights = Weights(reader, tuple(shapes), options.dtype, averaged=options.averaged)
    require_weights(weights, shapes, path)
    dtype = options.dtype or getattr(torch, reader.tensors[WORD_EMBEDDINGS].dtype)
    return ExportPlan(path, manifest, stored, architecture, weights, dtype, tokenizer, options)


def checkpoint_to_export(load: str, iteration: int) -> Path:
    """Return the folder of a run's checkpoint.

    Args:
        load: a run's --save folder, or one checkpoint in it.
        iteration: which one; 0: the latest.

    Raises:
        CheckpointError: there is none.
    """
    path = find_checkpoint(load, iteration)
    if path is None:
        raise CheckpointError(
            f"{load} contains no checkpoint" if Path(load).is_dir() else f"{load} does not exist",
            fix="Give the --save folder of a run, or one of its iter_… folders",
        )
    return path


def require_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse a checkpoint that lacks a weight of its model.

    Args:
        weights: its weights.
        shapes: the model's parameters.
        path: its folder, for the message.

    Raises:
        CheckpointError: a weight is missing, or of another shape.
    """
    for name, shape in shapes.items():
        saved = weights.tensors.get(name)
        if saved is None or saved.shape != shape:
            raise CheckpointError(
                f"The checkpoint {path} does not contain the weight {name} of its model"
                if saved is None
                else f"The weight {name} in {path} has the shape {format_shape(saved.shape)}, but its model has "
                f"{format_shape(shape)}",
                fix="Export another iteration (--iteration). See also `megatron-lite checkpoint inspect --tensors "
                f"{path}`",
            )


def export_checkpoint(
    plan: ExportPlan,
    output: Path,
    *,
    card: Callable[[Path, Verification | None], None] = lambda folder, verification: None,
    advance: Advance = lambda what, done, total: None,
) -> ExportReport:
    """Write the Hugging Face folder of a checkpoint.

    Args:
        plan: from plan_export.
        output: the folder to make; it must not exist, or be empty.
        card: writes further files (the model card) into the folder.
        advance: called with the current step, the amount done and the total.

    Raises:
        CheckpointError: a weight is not finite, transformers computes other logits, the output exists, or there is no
            room. Nothing is left of the output.
    """
    check_output(output)
    model = plan.stored.model
    exported = ExportedTensors(plan.weights, plan.architecture.entries(model), plan.dtype, plan.path)
    size = size_of(exported.tensors)
    with new_folder(output, size + _SPARE) as partial:
        ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        has_tokenizer = False
        if plan.tokenizer is not None:
            settings = replace(plan.stored.tokenizer, **(plan.options.tokenizer or {}))
            has_tokenizer = write_tokenizer(settings, plan.tokenizer, partial, plan.positions)
            ids = special_ids(plan.tokenizer, partial)
        _write_configs(plan, partial, ids)
        write_safetensors(
            partial, exported, plan.options.max_shard_size, lambda done, total: advance("exporting", done, total)
        )
        verification = _verify(plan, partial, has_tokenizer, advance) if plan.options.verify else None
        card(partial, verification)
        files = tuple(sorted(entry.relative_to(partial).as_posix() for entry in partial.rglob("*") if entry.is_file()))
        size = sum((partial / name).stat().st_size for name in files)
    return ExportReport(output, files, size, verification)


def _tokenizer(stored: StoredModel, manifest: Manifest, path: Path, options: ExportOptions) -> Tokenizer | None:
    if options.tokenizer is None:
        return None
    tokenizer = build_tokenizer(replace(stored.tokenizer, **options.tokenizer))
    if tokenizer.vocab_size > stored.model.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, more than the {stored.model.vocab_size:,} rows of "
            "the embedding in "
            f"{path}",
            fix="Give the tokenizer with which the model was trained, or export without one (--no-tokenizer)",
        )
    require_tokenizer(tokenizer, manifest, path)
    return tokenizer


def _write_configs(plan: ExportPlan, folder: Path, ids: Mapping[str, int | None]) -> None:
    dtype = str(plan.dtype).removeprefix("torch.")
    # transformers 4 reads torch_dtype, transformers 5 dtype.
    config = describe_config(
        plan.stored.model, plan.architecture, plan.positions, dtype=dtype, torch_dtype=dtype, **ids
    )
    generation = {"_from_model_config": True, **{name: value for name, value in ids.items() if value is not None}}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if plan.architecture.modeling_file:
        shutil.copyfile(FOLDER / plan.architecture.modeling_file, folder / plan.architecture.modeling_file)


def _verify(plan: ExportPlan, folder: Path, has_tokenizer: bool, advance: Advance) -> Verification:
    """Compare transformers' logits with ours, computed from the checkpoint with the weights rounded as exported."""
    model: ModelConfig = plan.stored.model
    length = min(plan.positions, max(plan.stored.seq_length, 2))
    tokens, text = sample_tokens(plan.tokenizer, plan.data, length, model.vocab_size)
    entries = plan.architecture.entries(model)
    rounded = ImportedTensors(
        ExportedTensors(plan.weights, entries, plan.dtype, plan.path), entries, parameter_shapes(model), plan.path
    )
    expected = streamed_logits(
        model, rounded, tokens, lambda done, total: advance("verifying, layer by layer", done, total)
    )
    tokenizer = plan.tokenizer if has_tokenizer and not isinstance(plan.tokenizer, NullTokenizer) else None
    return verify_logits(folder, tokens, text, expected, tokenizer=tokenizer, tolerance=plan.options.tolerance)
