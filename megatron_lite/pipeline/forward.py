"""Pipelined forward pass without gradients: each rank runs its stage, for evaluation and generation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lite.backend.group import Group


class ForwardStage(Protocol):
    """Stage of the model as far as a forward pass needs it; see GPTStage."""

    def __call__(self, x: Tensor | None, batch: Any, /, *cache: Any) -> Tensor:
        """Hidden states [s, b, h] (first stage: None) -> hidden states [s, b, h]."""

    def hidden_shape(self, length: int, batch_size: int) -> tuple[int, int, int]:
        """Return the shape of hidden states between stages."""

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Return the dtype of hidden states between stages."""


def stage_forward(stage: ForwardStage, pp: Group, batch: Any, *cache: Any) -> Tensor:
    """Receive hidden states from the previous stage, run this rank's stage, and send the result to the next one.

    All ranks of the pipeline call it with the same batches in the same order. A rank may run the next batch while later
    stages still work on this one.

    Args:
        stage: this rank's layers; one stage per rank.
        pp: the pipeline-parallel group.
        batch: the micro-batch, with tokens [b, s] on the device.
        cache: of keys and values, if the stage has one.

    Returns:
        The stage's hidden states [s, b, h]; on the last rank those that the head projects to logits.
    """
    x: Tensor | None = None
    if pp.rank > 0:
        batch_size, length = batch.tokens.shape
        x = torch.empty(stage.hidden_shape(length, batch_size), dtype=stage.hidden_dtype, device=batch.tokens.device)
        for work in pp.exchange([], [(x, pp.rank - 1)]):
            work.wait()
    hidden = stage(x, batch, *cache)
    if pp.rank < pp.size - 1:
        for work in pp.exchange([(hidden.contiguous(), pp.rank + 1)], []):
            work.wait()
    return hidden
