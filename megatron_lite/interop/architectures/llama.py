"""Hugging Face mapping of Llama, Mistral, Qwen2 and Qwen3: RoPE, RMSNorm, gated MLP, grouped-query attention."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS
from megatron_lite.interop.architectures.base import (
    GATED,
    Architecture,
    activation_name,
    linear,
    norms,
    qkv,
    read_activation,
    read_dropout,
    read_tied,
    requires,
    sharing_problems,
)
from megatron_lite.interop.architectures.keys import ConfigKeys
from megatron_lite.interop.architectures.rope import read_rope, write_rope
from megatron_lite.interop.mapping import Entry
from megatron_lite.interop.transforms import GateUp


@dataclass(frozen=True)
class _Defaults:
    """Defaults of a class for keys that config.json leaves out."""

    groups: int = 0
    """num_key_value_heads; 0: as many as heads."""
    head_dim: int = 0
    positions: int = 2048
    vocab_size: int = 32000
    epsilon: float = 1e-6


class Llama(Architecture):
    """LLaMA (Touvron et al. 2023, arXiv:2302.13971) with any number of key/value heads."""

    name = "LlamaForCausalLM"
    model_type = "llama"
    prefix = "model."
    ignored = (re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"), re.compile(r"model\.rotary_emb\..*"))
    defaults = _Defaults()

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what the class cannot express."""
        yield from _common_problems(model)
        if model.qk_layernorm:
            yield "--qk-layernorm"
        if model.linear_bias and not model.qkv_bias:
            yield "--disable-qkv-bias beside other biases"
        if model.qkv_bias and not model.linear_bias:
            yield "--add-qkv-bias without other biases"

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of the class's config."""
        bias, mlp_bias = bool(keys.take("attention_bias", default=False)), bool(keys.take("mlp_bias", default=False))
        if bias != mlp_bias:
            raise keys.unsupported("mlp_bias", mlp_bias, f"attention_bias is {bias}, and one flag sets both here")
        return self._read(keys, linear_bias=bias, qkv_bias=bias)

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of LlamaConfig."""
        return {**self._write(model, positions), "attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}

    def table(self, model: ModelConfig) -> Iterator[Entry]:
        """Yield the entries."""
        yield Entry(WORD_EMBEDDINGS, ("model.embed_tokens.weight",))
        for number in range(model.num_layers):
            ours, theirs = f"decoder.layers.{number}", f"model.layers.{number}"
            yield from norms(model, f"{ours}.input_norm", f"{theirs}.input_layernorm")
            for kind, biased in (("weight", True), ("bias", model.qkv_bias)):
                if biased:
                    names = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
                    yield Entry(f"{ours}.self_attention.qkv.{kind}", names, qkv(model))
            if model.qk_layernorm:
                yield from norms(model, f"{ours}.self_attention.q_norm", f"{theirs}.self_attn.q_norm")
                yield from norms(model, f"{ours}.self_attention.k_norm", f"{theirs}.self_attn.k_norm")
            yield from linear(f"{ours}.self_attention.proj", f"{theirs}.self_attn.o_proj", bias=model.linear_bias)
            yield from norms(model, f"{ours}.pre_mlp_norm", f"{theirs}.post_attention_layernorm")
            for kind, biased in (("weight", True), ("bias", model.linear_bias)):
                if biased:
                    names = tuple(f"{theirs}.mlp.{part}_proj.{kind}" for part in ("gate", "up"))
                    yield Entry(f"{ours}.mlp.fc1.{kind}", names, GateUp())
            yield from linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.down_proj", bias=model.linear_bias)
        yield from norms(model, "decoder.final_norm", "model.norm")

    def _read(self, keys: ConfigKeys, *, linear_bias: bool, qkv_bias: bool, qk_norm: bool = False) -> ModelConfig:
        hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
        return ModelConfig(
            num_layers=keys.number("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=keys.number("num_key_value_heads", default=self._groups(keys, heads)),
            head_dim=keys.number("head_dim", default=self.defaults.head_dim or max(1, hidden // heads)),
            ffn_hidden_size=keys.number("intermediate_size"),
            max_position_embeddings=keys.number("max_position_embeddings", default=self.defaults.positions),
            vocab_size=keys.number("vocab_size", default=self.defaults.vocab_size),
            **read_rope(keys),
            normalization="RMSNorm",
            norm_epsilon=float(keys.take("rms_norm_eps", default=self.defaults.epsilon)),
            activation=read_activation(keys, "hidden_act", GATED, "silu"),
            linear_bias=linear_bias,
            qkv_bias=qkv_bias,
            qk_layernorm=qk_norm,
            tied_embeddings=read_tied(keys, default=False),
            hidden_dropout=0.0,
            attention_dropout=read_dropout(keys, "attention_dropout", default=0.0),
            init_std=float(keys.take("initializer_range", default=0.02)),
        )

    def _groups(self, keys: ConfigKeys, heads: int) -> int:
        """Return the key/value heads of a config that leaves them out, or says null, which is another thing."""
        return heads if "num_key_value_heads" in keys.content or not self.defaults.groups else self.defaults.groups

    def _write(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        return {
            "attention_dropout": model.attention_dropout,
            "head_dim": model.head_dim,
            "hidden_act": activation_name(model, GATED),
            "hidden_size": model.hidden_size,
            "initializer_range": model.init_std,
            "intermediate_size": model.ffn_hidden_size,
            "max_position_embeddings": positions,
            "num_attention_heads": model.num_attention_heads,
            "num_hidden_layers": model.num_layers,
            "num_key_value_heads": model.num_query_groups,
            "rms_norm_eps": model.norm_epsilon,
            **write_rope(model),
        }


class Mistral(Llama):
    """Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama's tensors; exported as Llama."""

    name = "MistralForCausalLM"
    model_type = "mistral"
    exports = False
    defaults = _Defaults(groups=8, positions=4096 * 32)

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of a MistralConfig, which must not need a window of attention."""
        model = self._read(keys, linear_bias=False, qkv_bias=False)
        _no_window(keys, keys.content.get("sliding_window", 4096), model)
        keys.pass_over("sliding_window")
        return model

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Never called: exports is False."""
        raise NotImplementedError


class Qwen2(Llama):
    """Qwen2 (Yang et al. 2024, arXiv:2407.10671): biases on queries, keys and values only."""

    name = "Qwen2ForCausalLM"
    model_type = "qwen2"
    defaults = _Defaults(groups=32, positions=32768, vocab_size=151936)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what the class cannot express."""
        yield from _common_problems(model)
        if model.qk_layernorm:
            yield "--qk-layernorm"
        if model.linear_bias:
            yield "biases beside those of queries, keys and values (missing --disable-bias-linear)"
        if not model.qkv_bias:
            yield "missing --add-qkv-bias"
        if model.head_dim * model.num_attention_heads != model.hidden_size:
            yield f"heads of {model.head_dim} channels (--kv-channels)"

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of a Qwen2Config."""
        _no_layer_windows(keys)
        return self._read(keys, linear_bias=False, qkv_bias=True)

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of Qwen2Config."""
        return {**self._write(model, positions), "use_sliding_window": False}


class Qwen3(Llama):
    """Qwen3 (Yang et al. 2025, arXiv:2505.09388): norms on queries and keys."""

    name = "Qwen3ForCausalLM"
    model_type = "qwen3"
    defaults = _Defaults(groups=32, head_dim=128, positions=32768, vocab_size=151936)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what the class cannot express."""
        yield from _common_problems(model)
        if not model.qk_layernorm:
            yield "missing --qk-layernorm"
        if model.linear_bias or model.qkv_bias:
            yield "biases (missing --disable-bias-linear, or --add-qkv-bias)"

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of a Qwen3Config."""
        _no_layer_windows(keys)
        keys.require("attention_bias", (False,), "attention has no biases where the MLP has none", default=False)
        return self._read(keys, linear_bias=False, qkv_bias=False, qk_norm=True)

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of Qwen3Config."""
        return {**self._write(model, positions), "attention_bias": False, "use_sliding_window": False}


def _common_problems(model: ModelConfig) -> Iterator[str]:
    yield from sharing_problems(model)
    if model.position_embedding != "rotary":
        yield f"{model.position_embedding} positions (--position-embedding-type)"
    yield from requires(
        model,
        {
            "rotary_interleaved": (False, "--rotary-interleaved"),
            "rotary_percent": (1.0, f"--rotary-percent {model.rotary_percent:g}"),
            "normalization": ("RMSNorm", "--normalization LayerNorm"),
            "embed_layernorm": (False, "--embed-layernorm"),
            "residual_post_layernorm": (False, "--apply-residual-connection-post-layernorm"),
            "parallel_residual": (False, "--parallel-residual"),
        },
    )
    if not model.gated:
        yield f"--activation {model.activation}, which is not gated"


def _no_window(keys: ConfigKeys, window: int | None, model: ModelConfig) -> None:
    length = keys.seq_length or model.max_position_embeddings
    if window is not None and window < length:
        raise keys.unsupported(
            "sliding_window",
            window,
            f"attention is not windowed here, and sequences have up to {length} tokens (with --seq-length {window} or "
            "less, nothing changes)",
        )


def _no_layer_windows(keys: ConfigKeys) -> None:
    """Refuse windowed layers of Qwen; sliding_window and max_window_layers say nothing without use_sliding_window."""
    keys.require("use_sliding_window", (False,), "attention is not windowed here", default=False)
    layers = keys.take("layer_types", default=[])
    if set(layers) - {"full_attention"}:
        raise keys.unsupported("layer_types", layers, "every layer attends to the whole sequence here")
    keys.pass_over("sliding_window", "max_window_layers")
