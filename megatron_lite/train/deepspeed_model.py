"""Model with its loss as one autograd graph: the module that DeepSpeed wraps.

DeepSpeed takes gradients from autograd, and gathers the parameters of ZeRO stage 3 in hooks around the forward of each
module. The native engine's loss does neither: it is computed together with its gradients, outside of autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.model.head import Head
from megatron_lite.parallel.fp8 import Fp8
from megatron_lite.parallel.gemm import accumulate_weight_gradient_
from megatron_lite.parallel.parameters import NamedParameter


class LossScales(NamedTuple):
    """Factors of the sum of a micro-batch's losses.

    Attributes:
        share: samples or tokens are averaged by it: number of replicas / global batch. 0 leaves the micro-batch out.
        scale: loss scale, by which DeepSpeed multiplies the result before backward.
    """

    share: float
    scale: float


class LossModel(nn.Module):
    """The whole model on one pipeline stage, with its loss.

    Args:
        stage: all layers, embedding and head.
    """

    def __init__(self, stage: GPTStage) -> None:
        super().__init__()
        assert stage.output_layer is not None, "the model has one stage"
        self.stage = stage
        self.loss = _HeadLoss(stage.output_layer)

    def forward(self, batch: MicroBatch, scales: LossScales) -> tuple[Tensor, Tensor]:
        """Return the sum of losses times the share, a scalar, and the weighted loss of each sample [b], detached."""
        hidden = self.stage(None, batch)
        loss, samples = self.loss(hidden, batch, scales)
        return loss, samples.detach()


class _HeadLoss(nn.Module):
    """Output projection and loss. The head's weight is its own, so that stage 3 gathers it here, too."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.weight = head.weight
        self._head = (head,)  # not a part: the head belongs to the stage

    def forward(self, x: Tensor, batch: MicroBatch, scales: LossScales) -> tuple[Tensor, Tensor]:
        """`x` [s, b, E] (sequence parallel: [s/tp, b, E]) -> scalar and [b] fp32."""
        (head,) = self._head
        if not torch.is_grad_enabled():
            samples = head.sample_losses(x, batch, 0.0, None)[0]
            return samples.sum() * scales.share, samples
        loss: tuple[Tensor, Tensor] = _LinearLoss.apply(x, self.weight, head, batch, scales)
        return loss


class _LinearLoss(torch.autograd.Function):
    """Loss whose gradients are computed in forward (parallel/cross_entropy.py), with the loss scale of fp16 included.

    Gradients of half-precision logits would be rounded to zero if the scale were applied in backward only.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, head: Head, batch: MicroBatch, scales: LossScales
    ) -> tuple[Tensor, Tensor]:
        accumulated = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if weight.requires_grad else None

        def accumulate(
            parameter: nn.Parameter, gradient: Tensor, inputs: Tensor, /, *, last: bool = True, fp8: Fp8 | None = None
        ) -> None:
            if accumulated is not None:
                accumulate_weight_gradient_(accumulated, gradient, inputs, first=False, fp8=fp8)

        samples, gradient = head.sample_losses(x, batch, scales.share * scales.scale, accumulate)
        of_weight = None if accumulated is None else accumulated.to(weight.dtype)
        ctx.scale = scales.scale
        ctx.save_for_backward(gradient, of_weight)
        ctx.mark_non_differentiable(samples)
        return samples.sum() * scales.share, samples

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        of_x, of_weight = ctx.saved_tensors
        factor = grad / ctx.scale
        return of_x * factor.to(of_x.dtype), None if of_weight is None else of_weight * factor, None, None, None


def join_shared_parameters(stage: GPTStage) -> list[NamedParameter]:
    """Replace the views of shared parameters by the parameters themselves; return the parameters, each once.

    DeepSpeed moves the values of parameters, which would part the views from each other.
    """
    merged = stage.named_parameters_global()
    of_alias = {id(alias): parameter.param for parameter in merged for alias in parameter.aliases}
    for module in stage.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if id(param) in of_alias:
                setattr(module, name, of_alias[id(param)])
    return stage.named_parameters_global()
