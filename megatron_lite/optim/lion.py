"""Lion (Chen et al. 2023, arXiv:2302.06675): sign of an interpolation of momentum and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.optim.update_rule import CHUNK, PieceState, UpdateRule, prepare, states_of_shards
from megatron_lite.parallel.buffers import Shard


class Lion(UpdateRule):
    """Algorithm 2 of the paper, element by element: one moment, and steps of equal size.

    Args:
        beta1: share of the momentum in the update.
        beta2: share of the momentum in the next momentum.
        shards: main parameters.
    """

    def __init__(self, beta1: float, beta2: float, shards: Sequence[Shard]) -> None:
        self._beta1, self._beta2 = beta1, beta2
        self._shards = tuple(shards)
        self._moments = [torch.zeros_like(shard.values) for shard in shards]

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters, chunk by chunk."""
        applied = applies.float()
        for shard, moment in zip(self._shards, self._moments, strict=True):
            rate = lr * shard.lr_factor
            kept = 1.0 - applied * (rate * weight_decay if shard.decay else 0.0)
            for value, gradient, momentum in zip(
                *(flat.split(CHUNK) for flat in (shard.values, shard.gradients, moment)), strict=True
            ):
                prepare(gradient, divisor, applies)
                update = momentum.lerp(gradient, 1.0 - self._beta1).sign_()
                value.mul_(kept).addcmul_(update, applied * rate, value=-1.0)
                momentum.lerp_(gradient, applied * (1.0 - self._beta2))

    def states(self) -> list[PieceState]:
        """Return the momentum."""
        return states_of_shards(self._shards, [{"exp_avg": moment} for moment in self._moments])

    @property
    def nbytes(self) -> int:
        """Return the bytes of the momentum."""
        return sum(moment.nbytes for moment in self._moments)

    def load(self, applied: int) -> None:
        """Do nothing: a step does not depend on their number."""
