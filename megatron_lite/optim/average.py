"""Exponential moving average of the weights (Polyak & Juditsky 1992), in fp32 and sharded as the optimizer state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.optim.update_rule import CHUNK


class WeightAverage:
    """Moving average of main parameters: average = decay * average + (1 - decay) * parameter after each step.

    Args:
        decay: 0: no average.
        mains: flat fp32 main parameters, where the average begins.

    Attributes:
        values: an average for each main parameter; empty: no average.
    """

    def __init__(self, decay: float, mains: Sequence[Tensor]) -> None:
        self._decay = decay
        self._mains = tuple(mains)
        self.values = [main.clone() for main in mains] if decay else []

    def update(self, applies: Tensor) -> None:
        """Follow a step; `applies` is a bool scalar on the device, false for a step that was not applied."""
        share = applies.float() * (1.0 - self._decay)
        for average, main in zip(self.values, self._mains, strict=False):
            average.lerp_(main, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and main parameters, chunk by chunk."""
        for average, main in zip(self.values, self._mains, strict=False):
            for one, other in zip(average.split(CHUNK), main.split(CHUNK), strict=True):
                held = one.clone()
                one.copy_(other)
                other.copy_(held)
