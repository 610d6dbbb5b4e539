"""Hugging Face mapping of GPT2LMHeadModel: learned positions, Conv1D (transposed) weights, concatenated QKV."""

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
    linear,
    norms,
    qkv,
    read_activation,
    read_dropout,
    read_tied,
    requires,
)
from megatron_lite.interop.architectures.keys import DOWNLOAD, ConfigKeys
from megatron_lite.interop.mapping import Entry
from megatron_lite.interop.transforms import JoinedQKV, Transposed


class GPT2(Architecture):
    """GPT-2 (Radford et al. 2019)."""

    name = "GPT2LMHeadModel"
    model_type = "gpt2"
    prefix = "transformer."
    ignored = (re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what GPT-2 cannot express."""
        yield from biased_layer_norm_problems(model, "learned")
        yield from requires(
            model,
            {
                "embed_layernorm": (False, "--embed-layernorm"),
                "residual_post_layernorm": (False, "--apply-residual-connection-post-layernorm"),
                "parallel_residual": (False, "--parallel-residual"),
            },
        )
        if model.activation not in ACTIVATIONS.values():
            yield f"--activation {model.activation}"

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of a GPT2Config."""
        hidden, heads = keys.number("n_embd", "hidden_size"), keys.number("n_head", "num_attention_heads")
        keys.require("scale_attn_weights", (True,), "scores are always divided by √d here", default=True)
        keys.require("scale_attn_by_inverse_layer_idx", (False,), "scores are not scaled by layer here", default=False)
        keys.require("reorder_and_upcast_attn", (False,), "attention is computed in the model's dtype", default=False)
        if "n_ctx" in keys.content and keys.content["n_ctx"] != keys.content.get("n_positions"):
            raise keys.unsupported("n_ctx", keys.content["n_ctx"], "it differs from n_positions", fix=DOWNLOAD)
        keys.pass_over("n_ctx", *(name for name in keys.content if name.startswith("summary_")))
        return ModelConfig(
            num_layers=keys.number("n_layer", "num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_hidden_size=keys.number("n_inner", default=4 * hidden),
            max_position_embeddings=keys.number("n_positions", "max_position_embeddings", default=1024),
            vocab_size=keys.number("vocab_size", default=50257),
            norm_epsilon=float(keys.take("layer_norm_epsilon", default=1e-5)),
            activation=read_activation(keys, "activation_function", ACTIVATIONS, "gelu_new"),
            tied_embeddings=read_tied(keys, default=True),
            hidden_dropout=read_dropout(keys, "resid_pdrop", "embd_pdrop", default=0.1),
            attention_dropout=read_dropout(keys, "attn_pdrop", default=0.1),
            init_std=float(keys.take("initializer_range", default=0.02)),
        )

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of GPT2Config."""
        del positions  # the table's rows are the positions
        return {
            "activation_function": activation_name(model, ACTIVATIONS),
            "attn_pdrop": model.attention_dropout,
            "embd_pdrop": model.hidden_dropout,
            "initializer_range": model.init_std,
            "layer_norm_epsilon": model.norm_epsilon,
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_hidden_size,
            "n_layer": model.num_layers,
            "n_positions": model.max_position_embeddings,
            "resid_pdrop": model.hidden_dropout,
            "scale_attn_by_inverse_layer_idx": False,
            "scale_attn_weights": True,
            "reorder_and_upcast_attn": False,
        }

    def table(self, model: ModelConfig) -> Iterator[Entry]:
        """Yield the entries."""
        yield Entry(WORD_EMBEDDINGS, ("transformer.wte.weight",))
        yield Entry("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
        for number in range(model.num_layers):
            ours, theirs = f"decoder.layers.{number}", f"transformer.h.{number}"
            yield from norms(model, f"{ours}.input_norm", f"{theirs}.ln_1")
            order = JoinedQKV(qkv(model))
            yield Entry(f"{ours}.self_attention.qkv.weight", (f"{theirs}.attn.c_attn.weight",), Transposed(order))
            yield Entry(f"{ours}.self_attention.qkv.bias", (f"{theirs}.attn.c_attn.bias",), order)
            for mine, name in (
                ("self_attention.proj", "attn.c_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                yield from linear(f"{ours}.{mine}", f"{theirs}.{name}", bias=True, transform=Transposed())
            yield from norms(model, f"{ours}.pre_mlp_norm", f"{theirs}.ln_2")
        yield from norms(model, "decoder.final_norm", "transformer.ln_f")
