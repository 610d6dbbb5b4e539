"""Delayed fp8 scaling: histories of the largest absolute value (amax) of each operand, and scales derived from them.

The recipe of Transformer Engine and Megatron (Micikevicius et al. 2022, arXiv:2209.05433, section 4.2): the scale of an
operand is known before its values are, so that a kernel rounds them while it computes them. Here the histories grow by
one entry an iteration, the maximum over its micro-batches, replicas, context- and tensor-parallel ranks; the scales are
therefore the same in every layout. Transformer Engine updates them after each micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lite.backend.group import Group
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.parallel.fp8 import ROLES, DelayedScales, gradient_format
from megatron_lite.parallel.tensors import GlobalTensor, Piece


class AmaxHistory:
    """Histories of a rank's linear layers. Letters: n linear layers, t entries of a history, newest first.

    An operand that was zero in an iteration, or not finite, repeats its newest entry: the scales follow from the
    histories alone, so that a resumed run has the same ones.

    Args:
        layers: scales of each linear layer, by global name.
        config: length of a history, and the formula.
        group: ranks that hold the same layers, or parts of them: tp, cp and dp.
        device: of the layers.
    """

    def __init__(
        self, layers: Mapping[str, DelayedScales], config: Fp8Config, group: Group, device: torch.device
    ) -> None:
        self._layers = layers
        self._config = config
        self._group = group
        self._histories = torch.zeros(len(layers), config.amax_history_len, len(ROLES), device=device)
        largest = [
            torch.finfo(gradient_format(config) if role == "gradient" else torch.float8_e4m3fn).max for role in ROLES
        ]
        # --fp8-margin leaves room for values that grow from one iteration to the next.
        self._factors = torch.tensor([2.0**config.margin / value for value in largest], device=device)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the histories."""
        return self._histories.nbytes

    @torch.no_grad()
    def update(self) -> None:
        """End an iteration: add its maxima to the histories, and set the scales; a collective call."""
        if not self._layers:
            return
        maxima = [scales.maxima[role] for scales in self._layers.values() for role in ROLES]
        newest = torch.stack(maxima).view(-1, len(ROLES))
        newest = torch.where(newest.isfinite(), newest, 0.0)
        self._group.all_reduce_(newest, op="max")
        before = self._histories[:, :-1]
        newest = torch.where(newest > 0, newest, self._histories[:, 0])
        self._histories.copy_(torch.cat((newest.unsqueeze(1), before), dim=1))
        torch._foreach_zero_(maxima)
        self._set_scales()
        for scales in self._layers.values():
            scales.known = True

    @torch.no_grad()
    def resume(self) -> bool:
        """Set the scales after the histories have been loaded.

        Returns:
            Whether all layers have a history. The others' products use scales of the operands for one iteration.
        """
        self._set_scales()
        found = (self._histories > 0).flatten(1).any(1).tolist()
        for scales, known in zip(self._layers.values(), found, strict=True):
            scales.known = known
        return all(found)

    def state_tensors(self, *, write: bool) -> list[GlobalTensor]:
        """Return the history of each linear layer, optimizer.amax_history.<layer>, [t, 3] in the order of ROLES.

        Args:
            write: whether this rank saves them, for all ranks of the group.
        """
        return [
            GlobalTensor(
                f"optimizer.amax_history.{name}", tuple(history.shape), history.dtype, [Piece((0, 0), history)], write
            )
            for name, history in zip(self._layers, self._histories, strict=True)
        ]

    def _set_scales(self) -> None:
        if not self._layers:
            return
        largest = self._histories[:, 0] if self._config.amax_compute_algo == "most_recent" else self._histories.amax(1)
        found = (largest * self._factors).clamp(min=torch.finfo(torch.float32).tiny)
        found = torch.where(largest > 0, found, 1.0)
        scales: list[Tensor] = [entry.scales[role] for entry in self._layers.values() for role in ROLES]
        torch._foreach_copy_(scales, list(found.flatten().unbind()))
