"""Hugging Face mapping of GPTNeoXForCausalLM: partial rotary, LayerNorm, GELU, Megatron's QKV order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS
from megatron_lite.interop.architectures.base import (
    ACTIVATIONS,
    Architecture,
    activation_name,
    biased_layer_norm_problems,
    megatron_layers,
    norms,
    read_activation,
    read_dropout,
    read_tied,
    requires,
)
from megatron_lite.interop.architectures.keys import ConfigKeys
from megatron_lite.interop.architectures.rope import read_rope, write_rope
from megatron_lite.interop.mapping import Entry


class GPTNeoX(Architecture):
    """GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745)."""

    name = "GPTNeoXForCausalLM"
    model_type = "gpt_neox"
    prefix = "gpt_neox."
    head = "embed_out.weight"
    ignored = (re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what GPT-NeoX cannot express."""
        yield from biased_layer_norm_problems(model, "rotary")
        yield from requires(
            model,
            {
                "rotary_interleaved": (False, "--rotary-interleaved"),
                "embed_layernorm": (False, "--embed-layernorm"),
                "residual_post_layernorm": (False, "--apply-residual-connection-post-layernorm"),
            },
        )
        if model.activation not in ACTIVATIONS.values():
            yield f"--activation {model.activation}"

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of a GPTNeoXConfig."""
        keys.require("attention_bias", (True,), "attention has biases as long as the MLP has them", default=True)
        hidden = keys.number("hidden_size")
        return ModelConfig(
            num_layers=keys.number("num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=keys.number("num_attention_heads"),
            ffn_hidden_size=keys.number("intermediate_size"),
            max_position_embeddings=keys.number("max_position_embeddings", default=2048),
            vocab_size=keys.number("vocab_size"),
            **read_rope(keys, theta="rotary_emb_base", share="rotary_pct", percent=0.25),
            norm_epsilon=float(keys.take("layer_norm_eps", default=1e-5)),
            activation=read_activation(keys, "hidden_act", ACTIVATIONS, "gelu"),
            tied_embeddings=read_tied(keys, default=False),
            parallel_residual=bool(keys.take("use_parallel_residual", default=True)),
            hidden_dropout=read_dropout(keys, "hidden_dropout", default=0.0),
            attention_dropout=read_dropout(keys, "attention_dropout", default=0.0),
            init_std=float(keys.take("initializer_range", default=0.02)),
        )

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of GPTNeoXConfig."""
        return {
            "attention_bias": True,
            "attention_dropout": model.attention_dropout,
            "hidden_act": activation_name(model, ACTIVATIONS),
            "hidden_dropout": model.hidden_dropout,
            "hidden_size": model.hidden_size,
            "initializer_range": model.init_std,
            "intermediate_size": model.ffn_hidden_size,
            "layer_norm_eps": model.norm_epsilon,
            "max_position_embeddings": positions,
            "num_attention_heads": model.num_attention_heads,
            "num_hidden_layers": model.num_layers,
            "use_parallel_residual": model.parallel_residual,
            **write_rope(model, theta="rotary_emb_base", share="rotary_pct"),
        }

    def table(self, model: ModelConfig) -> Iterator[Entry]:
        """Yield the entries."""
        yield Entry(WORD_EMBEDDINGS, ("gpt_neox.embed_in.weight",))
        yield from megatron_layers(model, "gpt_neox.layers", "attention")
        yield from norms(model, "decoder.final_norm", "gpt_neox.final_layer_norm")
