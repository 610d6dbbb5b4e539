"""How the tensors of one stage split and where they lie: what every layer is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megatron_lite.backend.group import Group
from megatron_lite.parallel.weight_gradients import WeightGradients


@dataclass(frozen=True)
class Sharding:
    """The tp group, sequence parallelism, type and device of a stage's parameters."""

    tp: Group
    sequence_parallel: bool
    dtype: torch.dtype
    device: torch.device
    weight_gradients: WeightGradients | None = None
    """Where backward may leave the gradients of matrices for later; None: it computes them itself."""

    @property
    def split_sequence(self) -> bool:
        """Whether the tp ranks hold parts of the sequence between the parallel layers: [s/tp, b, h]."""
        return self.sequence_parallel and self.tp.size > 1

    def empty(self, *shape: int) -> nn.Parameter:
        """A parameter of this shape, not yet initialised."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device))
