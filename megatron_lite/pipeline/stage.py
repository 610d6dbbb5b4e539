"""What the executor needs of a stage and of a micro-batch; model/ provides both, and neither imports the other."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """A micro-batch of b samples."""

    tokens: Tensor
    """[b, s]."""
    number: int
    """Its number in the global batch."""
    sources: tuple[int, ...] | None
    """Data source of each sample; None where there is only one."""


class Stage(Protocol):
    """Consecutive layers of the model. Letters: s sequence, b micro-batch, h hidden."""

    def __call__(self, x: Tensor | None, batch: Any, /) -> Tensor:
        """Hidden states [s, b, h] (None into the first stage) -> hidden states, or logits from the last stage."""

    def sample_losses(self, logits: Tensor, batch: Any, /) -> Tensor:
        """The last stage's logits -> each sample's mean token loss, [b] fp32."""

    def hidden_shape(self, length: int, batch_size: int) -> tuple[int, int, int]:
        """Shape of the hidden states that stages hand on, for samples of `length` tokens."""

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Their type."""
