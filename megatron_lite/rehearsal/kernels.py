"""Meta-tensor versions of fused attention and RMSNorm: memory without the intermediates of unfused operators.

On the meta device torch decomposes these operators, and autograd would save what the GPU's kernels do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from megatron_lite.backend.kernels import Kernels
from megatron_lite.backend.vendors import torch_norm
from megatron_lite.config.run import RunConfig


class _RMSNorm(Function):
    """RMSNorm that saves its input and a statistic of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _, weight, _ = ctx.saved_tensors
        return torch.empty_like(grad), torch.empty_like(weight)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, zero_centered: bool) -> Tensor:
    """Return the norm; the form is NormKernel."""
    if bias is not None:
        return torch_norm(x, weight, bias, epsilon, zero_centered)
    if x.dtype == weight.dtype and not zero_centered:
        return _RMSNorm.apply(x, weight)
    return _RMSNorm.apply(x.float(), weight.float()).to(weight.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, causal: bool) -> Tensor:
    """Attention as a GPU runs it: shapes as in Backend.attention.

    FlashAttention in half precision without a mask, which takes grouped heads as they are; otherwise the
    memory-efficient kernel. Both keep the logarithm of each row's sum, and no attention matrix.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    if k.shape[2] != q.shape[2] and (mask is not None or not half):
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    query, key, value = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if mask is None and half:
        flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = flash(query, key, value, dropout, causal)[0]
    else:
        efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
        out = efficient(query, key, value, bias, True, dropout, causal)[0]
    return out.permute(2, 0, 1, 3)


def gpu_kernels(config: RunConfig) -> Kernels:
    """Return kernels like those that PyTorch has on every GPU; they add products to fp32 gradients in place."""
    fuses = config.precision.dtype != "fp32" and config.runtime.gradient_accumulation_fusion
    return Kernels(norm=_norm, weight_gradient=_no_product if fuses else None)


def _no_product(out: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
    """Do nothing: the product needs no memory."""
