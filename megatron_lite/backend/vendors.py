"""Vendor kernel adapters: one interface to the kernels of apex, Transformer Engine, flash-attn, Liger and CCE.

Each function imports a kernel and returns it in the form of the function that it replaces. The signatures are those of
the vendors' sources, named in the docstrings.

Letters: s sequence, b micro-batch, n query heads, g key/value heads, d channels of a head, h hidden, V vocabulary,
t and c tokens, i and o input and output channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_lite.config.run import RunConfig

NormKernel = Callable[[Tensor, Tensor, Tensor | None, float, bool], Tensor]
"""(x, weight, bias, epsilon, zero_centered): norm over the last dim in fp32; x [..., h], weight and bias [h] ->
[..., h] in the weight's dtype. LayerNorm, or without a bias RMSNorm. zero_centered: the weight is stored minus 1."""

WeightGradientKernel = Callable[[Tensor, Tensor, Tensor, bool], None]
"""(out, gradient, x, first): adds gradientᵀ x of bf16 or fp16 operands to `out` [o, i] fp32 while it is computed, or
overwrites `out` if `first`; `gradient` [t, o], `x` [t, i]."""


class AttentionKernel(Protocol):
    """Causal attention."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None, cu_seqlens: Tensor | None, dropout: float
    ) -> Tensor:
        """Return attention within samples or documents: q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d].

        Args:
            q: queries.
            k: keys.
            v: values.
            slopes: [n] fp32, ALiBi's; None: no bias.
            cu_seqlens: [documents + 1] int32, the first token of each document, samples one after the other, then s b;
                None: each sample is one document.
            dropout: probability; random numbers are those of the device's default generator.
        """


class LossKernel(NamedTuple):
    """Cross-entropy.

    Attributes:
        call: takes logits [c, V] and labels [c], or hidden states [t, h], weight [V, h] and labels [t]; returns the
            loss of each token in fp32, with gradients. It may overwrite the logits.
        projects: it takes hidden states and weight.
    """

    call: Callable[..., Tensor]
    projects: bool = False


def torch_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, zero_centered: bool) -> Tensor:
    """Return PyTorch's LayerNorm or RMSNorm; the form is NormKernel."""
    native = x.dtype == weight.dtype and not zero_centered
    dtype, shape = weight.dtype, weight.shape
    if not native:
        x, weight = x.float(), weight.float() + (1 if zero_centered else 0)
        bias = None if bias is None else bias.float()
    if bias is None:
        y = F.rms_norm(x, shape, weight, epsilon)
    elif x.device.type == "xla":
        y = _layer_norm_by_dim(x, weight, bias, epsilon)
    else:
        y = F.layer_norm(x, shape, weight, bias, epsilon)
    return y if native else y.to(dtype)


def _layer_norm_by_dim(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return LayerNorm over the last dim, in fp32, without flattening the others as torch_xla's kernel does."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * (centered.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (y * weight.float() + bias.float()).to(x.dtype)


def apex_norm(config: RunConfig) -> NormKernel:
    """Return NVIDIA apex's norms, whose output has the weight's dtype.

    `mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps, memory_efficient=False)` and
    `mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps, memory_efficient=False)` of
    apex/normalization/fused_layer_norm.py.
    """
    apex: Any = import_module("apex.normalization.fused_layer_norm")

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, zero_centered: bool) -> Tensor:
        assert not zero_centered
        if bias is None:
            y: Tensor = apex.mixed_dtype_fused_rms_norm_affine(x, weight, weight.shape, epsilon)
        else:
            y = apex.mixed_dtype_fused_layer_norm_affine(x, weight, bias, weight.shape, epsilon)
        return y

    return norm


def liger_norm(config: RunConfig) -> NormKernel:
    """Return Liger Kernel's norms.

    `liger_layer_norm(X, W, B, eps)` and `liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True)` of
    liger_kernel/transformers/functional.py. The casting mode gemma computes all of the norm in fp32, as PyTorch does;
    in_place would overwrite the gradient of the output.
    """
    liger: Any = import_module("liger_kernel.transformers.functional")

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, zero_centered: bool) -> Tensor:
        if bias is None:
            y: Tensor = liger.liger_rms_norm(x, weight, epsilon, 1.0 if zero_centered else 0.0, "gemma", False)
        else:
            y = liger.liger_layer_norm(x, weight, bias, epsilon)
        return y.to(weight.dtype)

    return norm


def te_norm(config: RunConfig) -> NormKernel:
    """Return Transformer Engine's norms.

    `LayerNorm(normalized_shape, eps, params_dtype, zero_centered_gamma, device)` and RMSNorm likewise, of
    transformer_engine/pytorch/module/, which own their parameters: they are called with the model's.
    """
    te: Any = import_module("transformer_engine.pytorch")

    @cache
    def module(size: int, kind: str, epsilon: float, zero_centered: bool, dtype: torch.dtype) -> Any:
        make = getattr(te, kind)
        return make(size, eps=epsilon, params_dtype=dtype, zero_centered_gamma=zero_centered, device="meta")

    # It makes modules and is no custom operator: a graph of torch.compile breaks around it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, zero_centered: bool) -> Tensor:
        kind = "RMSNorm" if bias is None else "LayerNorm"
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        of_size = module(weight.shape[0], kind, epsilon, zero_centered, weight.dtype)
        y: Tensor = torch.func.functional_call(of_size, parameters, (x,))
        return y

    return cast(NormKernel, norm)


def flash_attention(config: RunConfig) -> AttentionKernel:
    """Return FlashAttention-2 of the package flash-attn, also for AMD GPUs.

    `flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)` with
    q (batch, seqlen, nheads, headdim), and `flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, …)` of flash_attn/flash_attn_interface.py. Its bias -slope |i - j| is ALiBi's under the causal mask.
    """
    deterministic = config.runtime.deterministic

    def options(slopes: Tensor | None, dropout: float) -> dict[str, Any]:
        return {"dropout_p": dropout, "causal": True, "alibi_slopes": slopes, "deterministic": deterministic}

    return _flash(import_module("flash_attn"), options)


def flash3_attention(config: RunConfig) -> AttentionKernel:
    """Return FlashAttention-3 (Hopper), without dropout and ALiBi.

    `flash_attn_func(q, k, v, softmax_scale=None, causal=False, …, deterministic=False)` and `flash_attn_varlen_func` of
    hopper/flash_attn_interface.py; older versions also return the log-sum-exp.
    """
    deterministic = config.runtime.deterministic

    def options(slopes: Tensor | None, dropout: float) -> dict[str, Any]:
        assert slopes is None and not dropout
        return {"causal": True, "deterministic": deterministic}

    return _flash(import_module("flash_attn_interface"), options)


def _flash(flash: Any, options: Callable[[Tensor | None, float], dict[str, Any]]) -> AttentionKernel:
    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None, cu_seqlens: Tensor | None, dropout: float
    ) -> Tensor:
        length = q.shape[0]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if cu_seqlens is None:
            out = flash.flash_attn_func(q, k, v, **options(slopes, dropout))
        else:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            # The longest length is an upper bound, which does not change with the micro-batch.
            out = flash.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, length, length, **options(slopes, dropout)
            )
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        if cu_seqlens is not None:
            attended = attended.unflatten(0, (-1, length))
        return attended.transpose(0, 1)

    return attention


def te_attention(config: RunConfig) -> AttentionKernel:
    """Return Transformer Engine's attention, which chooses between cuDNN's and flash-attn's kernels.

    `DotProductAttention(num_attention_heads, kv_channels, num_gqa_groups, attention_dropout, qkv_format,
    attn_mask_type)` and its forward `(q, k, v, qkv_format, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv,
    attn_mask_type, core_attention_bias_type, alibi_slopes)` of transformer_engine/pytorch/attention/
    dot_product_attention/dot_product_attention.py; the formats sbhd and thd are [s, b, n, d] and [s b, n, d].
    """
    te: Any = import_module("transformer_engine.pytorch")

    @cache
    def module(heads: int, groups: int, channels: int, dropout: float) -> Any:
        return te.DotProductAttention(heads, channels, num_gqa_groups=groups, attention_dropout=dropout)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, slopes: Tensor | None, cu_seqlens: Tensor | None, dropout: float
    ) -> Tensor:
        length, _, heads, channels = q.shape
        core = module(heads, k.shape[2], channels, dropout)
        bias: dict[str, Any] = {}
        if slopes is not None:
            bias = {"core_attention_bias_type": "alibi", "alibi_slopes": slopes}
        if cu_seqlens is None:
            out: Tensor = core(q, k, v, qkv_format="sbhd", attn_mask_type="causal", **bias)
            return out.unflatten(-1, (heads, channels))
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        out = core(
            q,
            k,
            v,
            qkv_format="thd",
            attn_mask_type="padding_causal",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=length,
            max_seqlen_kv=length,
            **bias,
        )
        return out.unflatten(-1, (heads, channels)).unflatten(0, (-1, length)).transpose(0, 1)

    return cast(AttentionKernel, attention)


def te_loss(config: RunConfig) -> LossKernel:
    """Return Transformer Engine's cross-entropy of logits.

    `parallel_cross_entropy(inp, target, label_smoothing, reduce_loss, dist_process_group, ignore_idx,
    is_cg_capturable)` of transformer_engine/pytorch/cross_entropy.py, with inp (B, SQ, V). As capturable it reads no
    value back to the host.
    """
    te: Any = import_module("transformer_engine.pytorch.cross_entropy")

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = te.parallel_cross_entropy(logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, None, -100, True)
        return out.view(-1)

    return LossKernel(losses)


def liger_loss(config: RunConfig) -> LossKernel:
    """Return Liger Kernel's cross-entropy of logits, which computes their gradient with the loss.

    `liger_cross_entropy(input, target, …, ignore_index=-100, reduction="mean")` of
    liger_kernel/transformers/functional.py. It counts the labels on the host, which waits for the device.
    """
    liger: Any = import_module("liger_kernel.transformers.functional")

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = liger.liger_cross_entropy(logits, labels, reduction="none")
        return out

    return LossKernel(losses)


def cce_loss(config: RunConfig) -> LossKernel:
    """Return cut cross-entropy (Wijmans et al. 2024, arXiv:2411.09009), which never stores logits.

    `linear_cross_entropy(e, c, targets, …, reduction="mean", filter_eps="auto", impl="cce")` of
    cut_cross_entropy/linear_cross_entropy.py. Without filter_eps it leaves out no small gradient.
    """
    cce: Any = import_module("cut_cross_entropy")

    def losses(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = cce.linear_cross_entropy(x, weight, labels, reduction="none", filter_eps=None)
        return out.float()

    return LossKernel(losses, projects=True)


def apex_weight_gradient(config: RunConfig) -> WeightGradientKernel:
    """Return NVIDIA apex's product, `wgrad_gemm_accum_fp32(input_2d, grad_output_2d, main_grad)` of csrc/megatron/."""
    extension: Any = import_module("fused_weight_gradient_mlp_cuda")

    def add_product(out: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        if first:
            out.zero_()
        extension.wgrad_gemm_accum_fp32(x.contiguous(), gradient.contiguous(), out)

    return add_product


def torch_weight_gradient(config: RunConfig) -> WeightGradientKernel:
    """Return PyTorch's product with an fp32 result, which only GPUs have."""

    def add_product(out: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        torch.addmm(out, gradient.t(), x, beta=0 if first else 1, out_dtype=torch.float32, out=out)

    return add_product
