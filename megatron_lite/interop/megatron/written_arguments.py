"""Export args builder: Megatron-LM and DeepSpeed args from a ModelConfig; refuses unsupported models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_lite.config.model import ModelConfig
from megatron_lite.interop.architectures.base import sharing_problems
from megatron_lite.interop.megatron.arguments import DEEPSPEED_EMBEDDING_EPSILON
from megatron_lite.interop.megatron.naming import DEEPSPEED, LEGACY, Scheme
from megatron_lite.schedules.progress import Progress

_MEGATRON_LM = ("gelu_tanh", "gelu", "swiglu", "squared_relu")
_MEGATRON_DEEPSPEED = ("gelu_tanh", "gelu", "swiglu", "geglu", "reglu", "liglu")
_POSITIONS = {"learned": "learned_absolute", "rotary": "rope", "none": "none", "alibi": "alibi"}
_DEEPSPEED_POSITIONS = {"learned": "absolute", "rotary": "rotary", "alibi": "alibi"}


def is_deepspeed_only(model: ModelConfig) -> bool:
    """Return whether the model needs features that Megatron-DeepSpeed has and Megatron-LM lacks."""
    return (
        model.position_embedding == "alibi" or model.embed_layernorm or model.activation in ("geglu", "reglu", "liglu")
    )


def gate_first(model: ModelConfig, scheme: Scheme) -> bool:
    """Return whether the gate precedes the up projection, as in Megatron-LM; in Megatron-DeepSpeed it follows."""
    return not uses_glu_activation(model, scheme)


def uses_glu_activation(model: ModelConfig, scheme: Scheme) -> bool:
    """Return whether the gated MLP is written as Megatron-DeepSpeed's --glu-activation."""
    return model.gated and (scheme is DEEPSPEED or model.activation != "swiglu")


def problems(model: ModelConfig, scheme: Scheme) -> Iterator[str]:
    """Yield what of a model a format cannot express, each with the flag that asks for it."""
    yield from sharing_problems(model)
    activations = _MEGATRON_DEEPSPEED if scheme is DEEPSPEED or is_deepspeed_only(model) else _MEGATRON_LM
    if model.activation not in activations:
        yield f"--activation {model.activation}"
    if model.parallel_residual:
        yield "--parallel-residual"
    if model.linear_bias and not model.qkv_bias:
        yield "--disable-qkv-bias"
    if scheme not in (DEEPSPEED, LEGACY) and is_deepspeed_only(model):
        yield "--embed-layernorm, ALiBi or --glu-activation, which Megatron-DeepSpeed alone has (--naming legacy)"
    if model.embed_layernorm and model.norm_epsilon != DEEPSPEED_EMBEDDING_EPSILON:
        yield f"--norm-epsilon {model.norm_epsilon:g} with --embed-layernorm"
    if model.qk_layernorm and scheme in (DEEPSPEED, LEGACY):
        yield "--qk-layernorm (--naming local can)" if scheme is LEGACY else "--qk-layernorm"
    if scheme is not DEEPSPEED and not is_deepspeed_only(model):
        return
    for field, value, flag in (
        ("normalization", "LayerNorm", "--normalization RMSNorm"),
        ("num_query_groups", model.num_attention_heads, "--num-query-groups"),
        ("linear_bias", True, "--disable-bias-linear"),
        ("tied_embeddings", True, "--untie-embeddings-and-output-weights"),
        ("zero_centered_norm", False, "--apply-layernorm-1p"),
        ("rotary_interleaved", False, "--rotary-interleaved"),
        ("rotary_base", 10000.0, "--rotary-base"),
        ("rotary_percent", 1.0, "--rotary-percent"),
        ("rotary_scaling", 1.0, "--rotary-seq-len-interpolation-factor"),
    ):
        if getattr(model, field) != value:
            yield flag
    if model.position_embedding not in _DEEPSPEED_POSITIONS:
        yield f"{model.position_embedding} positions (--position-embedding-type)"


def written_arguments(
    model: ModelConfig, scheme: Scheme, *, tp: int, pp: int, rows: int, progress: Progress, seq_length: int, dtype: Any
) -> dict[str, Any]:
    """Return the args that a file of Megatron-LM or Megatron-DeepSpeed has of a model.

    Args:
        model: the model.
        scheme: the naming scheme.
        tp: tensor-parallel size.
        pp: pipeline size.
        rows: the padded vocabulary.
        progress: of the run.
        seq_length: the longest sequence.
        dtype: of the weights.
    """
    deepspeed = scheme is DEEPSPEED or is_deepspeed_only(model)
    positions = (_DEEPSPEED_POSITIONS if deepspeed else _POSITIONS)[model.position_embedding]
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings or seq_length,
        "seq_length": seq_length,
        "position_embedding_type": positions,
        "layernorm_epsilon": model.norm_epsilon,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_std,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "openai_gelu": False,
        "onnx_safe": None,
        "apply_residual_connection_post_layernorm": model.residual_post_layernorm,
        "fp32_residual_connection": model.fp32_residual,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "padded_vocab_size": rows,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "iteration": progress.iteration,
        "consumed_train_samples": progress.consumed_train_samples,
        "consumed_valid_samples": progress.consumed_valid_samples,
    }
    if deepspeed:
        values["embed_layernorm"] = model.embed_layernorm
        values["glu_activation"] = model.activation if uses_glu_activation(model, scheme) else None
        return values
    return values | _of_megatron_lm(model)


def _of_megatron_lm(model: ModelConfig) -> dict[str, Any]:
    """Return the args that Megatron-LM alone has."""
    grouped = model.num_query_groups != model.num_attention_heads
    return {
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "apply_layernorm_1p": model.zero_centered_norm,
        "add_position_embedding": model.position_embedding == "learned",
        "use_rotary_position_embeddings": model.position_embedding == "rotary",
        "rotary_base": int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rotary_interleaved": model.rotary_interleaved,
        "rotary_seq_len_interpolation_factor": None if model.rotary_scaling == 1 else model.rotary_scaling,
        "swiglu": model.activation == "swiglu",
        "squared_relu": model.activation == "squared_relu",
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias and not model.linear_bias,
        "group_query_attention": grouped,
        "num_query_groups": model.num_query_groups if grouped else 1,
        "qk_layernorm": model.qk_layernorm,
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
    }
