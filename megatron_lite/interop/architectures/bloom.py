"""Hugging Face mapping of BloomForCausalLM: ALiBi, embedding LayerNorm, tanh GELU, Megatron's QKV order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS
from megatron_lite.interop.architectures.base import (
    Architecture,
    biased_layer_norm_problems,
    megatron_layers,
    norms,
    read_dropout,
    read_tied,
    requires,
)
from megatron_lite.interop.architectures.keys import ConfigKeys
from megatron_lite.interop.mapping import Entry


class Bloom(Architecture):
    """BLOOM (BigScience 2022, arXiv:2211.05100)."""

    name = "BloomForCausalLM"
    model_type = "bloom"
    prefix = "transformer."
    ignored = (re.compile(r"transformer\.h\.\d+\.self_attention\.(bias|masked_bias)"),)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what BLOOM cannot express."""
        yield from biased_layer_norm_problems(model, "alibi")
        yield from requires(
            model,
            {
                "embed_layernorm": (True, "missing --embed-layernorm"),
                "activation": ("gelu_tanh", f"--activation {model.activation}"),
                "ffn_hidden_size": (4 * model.hidden_size, f"--ffn-hidden-size {model.ffn_hidden_size}"),
                "parallel_residual": (False, "--parallel-residual"),
            },
        )

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of a BloomConfig."""
        after_norm = keys.take("apply_residual_connection_post_layernorm", default=False)
        keys.pass_over(
            *("slow_but_exact", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion"),
            *("unk_token_id", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "seq_length"),
        )
        return ModelConfig(
            num_layers=keys.number("n_layer", "num_hidden_layers"),
            hidden_size=keys.number("n_embed", "hidden_size"),
            num_attention_heads=keys.number("n_head", "num_attention_heads"),
            max_position_embeddings=int(keys.content.get("seq_length") or 2048),
            vocab_size=keys.number("vocab_size", default=250880),
            position_embedding="alibi",
            norm_epsilon=float(keys.take("layer_norm_epsilon", default=1e-5)),
            activation="gelu_tanh",
            tied_embeddings=read_tied(keys, default=True),
            embed_layernorm=True,
            residual_post_layernorm=bool(after_norm),
            hidden_dropout=read_dropout(keys, "hidden_dropout", default=0.0),
            attention_dropout=read_dropout(keys, "attention_dropout", default=0.0),
            init_std=float(keys.take("initializer_range", default=0.02)),
        )

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of BloomConfig."""
        return {
            "apply_residual_connection_post_layernorm": model.residual_post_layernorm,
            "attention_dropout": model.attention_dropout,
            "hidden_dropout": model.hidden_dropout,
            "hidden_size": model.hidden_size,
            "initializer_range": model.init_std,
            "layer_norm_epsilon": model.norm_epsilon,
            "n_head": model.num_attention_heads,
            "n_layer": model.num_layers,
            "seq_length": positions,
            "slow_but_exact": False,
        }

    def table(self, model: ModelConfig) -> Iterator[Entry]:
        """Yield the entries."""
        yield Entry(WORD_EMBEDDINGS, ("transformer.word_embeddings.weight",))
        yield from norms(model, "embedding.norm", "transformer.word_embeddings_layernorm")
        yield from megatron_layers(model, "transformer.h", "self_attention")
        yield from norms(model, "decoder.final_norm", "transformer.ln_f")
