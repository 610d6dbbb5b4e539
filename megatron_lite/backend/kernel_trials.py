"""Trials of vendor kernels: values and gradients on small inputs, compared with plain PyTorch in fp32.

An extension may have been built for another torch or another GPU, and a version may have other defaults: such a kernel
is found before the run begins, not in its loss.

Letters: as in backend/vendors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lite.backend.vendors import AttentionKernel, LossKernel, NormKernel, WeightGradientKernel, torch_norm
from megatron_lite.config.run import RunConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENS, _VOCABULARY = 32, 512


def tolerance(function: str, config: RunConfig) -> float:
    """Return the largest deviation of a kernel, relative to the largest element; that of roundings in the dtype."""
    if function == "weight gradient":
        return 0.0
    return 1e-3 if config.precision.dtype == "fp32" else 3e-2


def try_norm(kernel: NormKernel, config: RunConfig, device: torch.device) -> float:
    """Return the deviation of a norm over the hidden size, and over a head's channels if the model has such norms."""
    model, dtype = config.model, _DTYPES[config.precision.dtype]
    deviation = 0.0
    for size in (model.hidden_size, *([model.head_dim] if model.qk_layernorm else [])):
        x = _random(device, torch.float32 if model.fp32_residual else dtype, _TOKENS, 2, size)
        weight, bias = (_random(device, dtype, size) for _ in range(2))
        inputs = [x, weight] if model.normalization == "RMSNorm" else [x, weight, bias]

        def norm(by: NormKernel, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return by(x, weight, bias, model.norm_epsilon, model.zero_centered_norm)

        deviation = max(deviation, _deviation(lambda *xs: norm(kernel, *xs), lambda *xs: norm(torch_norm, *xs), inputs))
    return deviation


def try_attention(kernel: AttentionKernel, config: RunConfig, device: torch.device) -> float:
    """Return the deviation of attention with the model's heads, ALiBi and documents, without dropout."""
    model, tp = config.model, config.parallel.tp
    heads, groups = model.num_attention_heads // tp, model.num_query_groups // tp
    q, k, v = (
        _random(device, _DTYPES[config.precision.dtype], _TOKENS, 2, n, model.head_dim) for n in (heads, groups, groups)
    )
    slopes = cu_seqlens = None
    if model.position_embedding == "alibi":
        slopes = torch.linspace(0.1, 1.0, heads, device=device)
    place = torch.arange(2 * _TOKENS, device=device)
    document = place // _TOKENS
    if config.data.reset_attention_mask:
        cu_seqlens = torch.tensor([0, 5, _TOKENS, 2 * _TOKENS], dtype=torch.int32, device=device)
        document = torch.bucketize(place, cu_seqlens[1:], right=True)
    distance = (place - place.unsqueeze(1)).float()
    bias = torch.zeros(heads, 1, 1, device=device) if slopes is None else slopes.view(-1, 1, 1) * distance
    bias = bias.masked_fill((document != document.unsqueeze(1)) | (distance > 0), float("-inf"))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
        rows, keys, values = (x.transpose(0, 1).flatten(0, 1).transpose(0, 1) for x in (q, k, v))
        scores = rows @ keys.transpose(1, 2) / model.head_dim**0.5 + bias
        out = scores.softmax(-1) @ values
        return out.transpose(0, 1).unflatten(0, (2, _TOKENS)).transpose(0, 1)

    return _deviation(
        lambda q, k, v: kernel(q, k, v, slopes=slopes, cu_seqlens=cu_seqlens, dropout=0.0), reference, [q, k, v]
    )


def try_loss(kernel: LossKernel, config: RunConfig, device: torch.device) -> float:
    """Return the deviation of the losses of a small vocabulary; logits of padding are -inf."""
    dtype, hidden = _DTYPES[config.precision.dtype], config.model.embedding_width
    labels = torch.randint(_VOCABULARY, (_TOKENS,), generator=torch.Generator().manual_seed(1)).to(device)
    x, weight = _random(device, dtype, _TOKENS, hidden), _random(device, dtype, _VOCABULARY, hidden) / hidden**0.5
    if kernel.projects:
        return _deviation(
            lambda x, weight: kernel.call(x, weight, labels),
            lambda x, weight: F.cross_entropy(x @ weight.t(), labels, reduction="none"),
            [x, weight],
        )
    logits = F.pad(x @ weight.t(), (0, 16), value=float("-inf"))
    return _deviation(
        lambda logits: kernel.call(logits, labels),
        lambda logits: F.cross_entropy(logits, labels, reduction="none"),
        [logits],
    )


def try_weight_gradient(kernel: WeightGradientKernel, config: RunConfig, device: torch.device) -> float:
    """Return the deviation of two products, one that overwrites and one that adds; integers, so that it is exact."""
    dtype = _DTYPES[config.precision.dtype]
    gradient, x = (torch.arange(256, device=device).view(16, 16).remainder(n).to(dtype) for n in (7, 5))
    out = torch.ones(16, 16, device=device)
    kernel(out, gradient, x, True)
    kernel(out, gradient, x, False)
    return float((out - 2 * gradient.float().t() @ x.float()).abs().max())


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return normal values that depend on the shape only; default generators are not used."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _deviation(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """Return the largest deviation of the output and the inputs' gradients, relative to the largest element of each."""
    found = _with_gradients(kernel, [x.clone() for x in inputs])
    expected = _with_gradients(reference, [x.float() for x in inputs])
    worst = 0.0
    for one, two in zip(found, expected, strict=True):
        if one.shape != two.shape:
            return float("inf")
        deviation = float((one.float() - two).abs().max() / two.abs().max().clamp(min=1e-6))
        worst = max(worst, deviation) if isfinite(deviation) else float("inf")
    return worst


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, _random(out.device, out.dtype, *out.shape))]
