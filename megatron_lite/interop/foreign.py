"""ForeignModel dataclass: config, renamed tensors and training state of a checkpoint to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_lite.checkpoint.sources import TensorSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.tokenizer import TokenizerConfig


@dataclass(frozen=True, eq=False)
class ForeignModel:
    """A foreign checkpoint, read and checked, but for the values of its tensors.

    Attributes:
        model: its shape; vocab_size counts the tokens of its tokenizer.
        tensors: what is imported, under our names: weights, and optimizer state if there is any.
        raw: all of its tensors under their own names.
        tokenizer: settings of its tokenizer, if it has one.
        dtype: of its weights.
        seq_length: the longest sequence it is used with.
        notes: what the user should know.
        iteration: of the run that wrote it.
        scalars: progress and optimizer scalars, as a checkpoint's manifest has them; empty: a fresh start.
    """

    model: ModelConfig
    tensors: TensorSource
    raw: TensorSource
    tokenizer: TokenizerConfig | None
    dtype: torch.dtype
    seq_length: int
    notes: tuple[str, ...] = ()
    iteration: int = 0
    scalars: Mapping[str, Any] = field(default_factory=dict)
