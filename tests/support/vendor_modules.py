"""Stand-ins for vendor kernels on a CPU: modules with the documented signatures, computed by PyTorch.

The signatures are those of NVIDIA/apex, NVIDIA/TransformerEngine, Dao-AILab/flash-attention, linkedin/Liger-Kernel and
apple/ml-cross-entropy.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F


def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.layer_norm(input.float(), normalized_shape, weight.float(), bias.float(), eps).to(weight.dtype)


def mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return F.rms_norm(input.float(), normalized_shape, weight.float(), eps).to(weight.dtype)


def wgrad_gemm_accum_fp32(input_2d, grad_output_2d, main_grad):
    main_grad.add_(grad_output_2d.float().t() @ input_2d.float())


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(X, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True):
    assert casting_mode == "gemma" and not in_place
    return F.rms_norm(X.float(), W.shape, W.float() + offset, eps).to(X.dtype)


def liger_cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index: int = -100,
    reduce=None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap=None,
    return_z_loss: bool = False,
):
    return F.cross_entropy(input.float(), target, ignore_index=ignore_index, reduction=reduction)


class _Norm(nn.Module):
    def __init__(self, normalized_shape, *, eps=1e-5, params_dtype=None, zero_centered_gamma=False, device="cuda"):
        super().__init__()
        self.eps, self.offset = eps, float(zero_centered_gamma)
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device=device))


class RMSNorm(_Norm):
    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


class LayerNorm(_Norm):
    def __init__(self, normalized_shape, **options):
        super().__init__(normalized_shape, **options)
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x):
        weight, bias = self.weight.float() + self.offset, self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, weight, bias, self.eps).to(x.dtype)


def parallel_cross_entropy(
    inp,
    target,
    label_smoothing=0.0,
    reduce_loss=False,
    dist_process_group=None,
    ignore_idx=-100,
    is_cg_capturable=False,
):
    assert inp.dim() == 3 and target.dtype == torch.int64 and not reduce_loss and dist_process_group is None
    return F.cross_entropy(inp.flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)


class DotProductAttention(nn.Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0):
        super().__init__()
        self.dropout = attention_dropout

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
    ):
        assert (core_attention_bias_type == "alibi") == (alibi_slopes is not None)
        layers = (query_layer, key_layer, value_layer)
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal" and cu_seqlens_q is cu_seqlens_kv
            return flash_attn_varlen_func(
                *layers, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, self.dropout, None, True,
                alibi_slopes=alibi_slopes,
            ).flatten(-2)  # fmt: skip
        assert (qkv_format, attn_mask_type) == ("sbhd", "causal")
        q, k, v = (x.transpose(0, 1) for x in layers)
        out = flash_attn_func(q, k, v, self.dropout, causal=True, alibi_slopes=alibi_slopes)
        return out.transpose(0, 1).flatten(-2)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    samples, length = q.shape[:2]
    cu_seqlens = torch.arange(0, (samples + 1) * length, length, dtype=torch.int32)
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, cu_seqlens, length, length, dropout_p, softmax_scale, causal,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    return out.unflatten(0, (samples, length))


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == q.shape[0]
    place = torch.arange(q.shape[0])
    document = torch.bucketize(place, cu_seqlens_q[1:], right=True)
    distance = (place.unsqueeze(1) - place).float()
    bias = torch.zeros(1, 1, 1) if alibi_slopes is None else -alibi_slopes.view(-1, 1, 1) * distance.abs()
    bias = bias.masked_fill((document.unsqueeze(1) != document) | (distance < 0), float("-inf"))
    rows, keys, values = (x.float().transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    groups = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(rows, keys, values, bias.unsqueeze(0), dropout_p, enable_gqa=groups)
    return out.squeeze(0).transpose(0, 1).to(q.dtype)


def flash3_attn_func(q, k, v, softmax_scale=None, causal=False, *, window_size=(-1, -1), deterministic=False):
    out = flash_attn_func(q, k, v, causal=causal)
    return out, out.new_zeros(())  # the log-sum-exp, before 2025


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    assert filter_eps is None
    return F.cross_entropy(e.float() @ c.float().t(), targets, reduction=reduction)


MODULES = {
    "fused_layer_norm_cuda": {},
    "apex": {},
    "apex.normalization.fused_layer_norm": {
        "mixed_dtype_fused_layer_norm_affine": mixed_dtype_fused_layer_norm_affine,
        "mixed_dtype_fused_rms_norm_affine": mixed_dtype_fused_rms_norm_affine,
    },
    "fused_weight_gradient_mlp_cuda": {"wgrad_gemm_accum_fp32": wgrad_gemm_accum_fp32},
    "liger_kernel": {},
    "liger_kernel.transformers.functional": {
        "liger_layer_norm": liger_layer_norm,
        "liger_rms_norm": liger_rms_norm,
        "liger_cross_entropy": liger_cross_entropy,
    },
    "transformer_engine": {},
    "transformer_engine.pytorch": {
        "LayerNorm": LayerNorm,
        "RMSNorm": RMSNorm,
        "DotProductAttention": DotProductAttention,
    },
    "transformer_engine.pytorch.cross_entropy": {"parallel_cross_entropy": parallel_cross_entropy},
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "flash_attn_interface": {"flash_attn_func": flash3_attn_func},
    "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
}


def install(monkeypatch, *packages):
    """Install the stand-ins of top-level modules, and make every other vendor's module missing."""
    for name, content in MODULES.items():
        module = None
        if name.partition(".")[0] in packages:
            module = ModuleType(name)
            vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
