"""Model description of a checkpoint: shape, tokenizer, precision and sequence length, from the manifest's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.data import TokenizerConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.record import from_record
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.runs.manifest import Manifest
from megatron_lite.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class StoredModel:
    """The sections of a run's config that describe its model; batch size, layout and schedules do not."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    precision: PrecisionConfig
    seq_length: int


def stored_model(manifest: Manifest, path: Path) -> StoredModel:
    """Return the description of the model that a checkpoint holds.

    Args:
        manifest: the checkpoint's.
        path: its folder, for the message.

    Raises:
        CheckpointError: the manifest has no config.
        ConfigError: its config has fields that this version does not know.
    """
    stored: Mapping[str, Any] = manifest.provenance.config
    missing = [part for part in ("model", "tokenizer", "precision") if part not in stored]
    if missing:
        raise CheckpointError(
            "A checkpoint's manifest must hold the run's config",
            found=f"{path} lacks {', '.join(missing)}",
            fix="Load a checkpoint that training wrote",
        )
    return StoredModel(
        from_record(ModelConfig, stored["model"]),
        from_record(TokenizerConfig, stored["tokenizer"]),
        from_record(PrecisionConfig, stored["precision"]),
        stored.get("batch", {}).get("seq_length", 1),
    )


def require_tokenizer(tokenizer: Tokenizer, manifest: Manifest, path: Path) -> None:
    """Refuse a tokenizer that is not the one that the model was trained with.

    Raises:
        ConfigError: the fingerprints differ.
    """
    wanted = manifest.provenance.fingerprints.get("tokenizer")
    if wanted and wanted != tokenizer.fingerprint():
        raise ConfigError(
            "A model must be used with the tokenizer it was trained with",
            found=f"{path} was trained with {wanted}, this tokenizer is {tokenizer.fingerprint()}",
            fix="Name the run's own files with --vocab-file and --merge-file, or --tokenizer-model",
        )
