"""Checkpoint model summary: shape, tokenizer, precision and sequence length, from the manifest's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.record import from_record
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.runs.manifest import MANIFEST_NAME, Manifest
from megatron_lite.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class StoredModel:
    """Sections of a run's config that describe its model: all but batch size, layout and schedules."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    precision: PrecisionConfig
    seq_length: int


def stored_model(manifest: Manifest, path: Path) -> StoredModel:
    """Return the description of a checkpoint's model.

    Args:
        manifest: of the checkpoint.
        path: folder of the checkpoint, for errors.

    Raises:
        CheckpointError: the manifest has no config.
        ConfigError: the config has fields that this version does not have.
    """
    stored: Mapping[str, Any] = manifest.provenance.config
    missing = [part for part in ("model", "tokenizer", "precision") if part not in stored]
    if missing:
        raise CheckpointError(
            f"The checkpoint {path} does not describe its model: its manifest.json has no config of "
            f"{', '.join(missing)}",
            fix="Give a checkpoint that `megatron-lite train` or `megatron-lite import` wrote",
        )
    where = f"{path / MANIFEST_NAME} (megatron_lite {manifest.writer.get('megatron_lite', 'of an unknown version')})"
    return StoredModel(
        from_record(ModelConfig, stored["model"], where),
        from_record(TokenizerConfig, stored["tokenizer"], where),
        from_record(PrecisionConfig, stored["precision"], where),
        stored.get("batch", {}).get("seq_length", 1),
    )


def require_tokenizer(tokenizer: Tokenizer, manifest: Manifest, path: Path) -> None:
    """Refuse a tokenizer other than the one that the model was trained with.

    Raises:
        ConfigError: the fingerprints differ.
    """
    wanted = manifest.provenance.fingerprints.get("tokenizer")
    if wanted and wanted != tokenizer.fingerprint():
        raise ConfigError(
            f"The model of {path} was trained with another tokenizer: its fingerprint is {wanted}, that of the "
            "tokenizer given "
            f"is {tokenizer.fingerprint()}",
            fix="Give the tokenizer of that training with --tokenizer-model, or --vocab-file and --merge-file",
        )
