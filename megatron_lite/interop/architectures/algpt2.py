"""Hugging Face mapping of ALGPT2LMHeadModel: GPT-2 with shared layers and a factorized embedding.

transformers lacks the class: an export contains its modeling file, which trust_remote_code=True loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS
from megatron_lite.config.sharing import num_groups, read_sharing, stored_name
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.architectures.base import linear, norms, qkv
from megatron_lite.interop.architectures.gpt2 import GPT2
from megatron_lite.interop.architectures.keys import DOWNLOAD, ConfigKeys
from megatron_lite.interop.mapping import Entry
from megatron_lite.interop.modeling_files import FOLDER, is_unchanged
from megatron_lite.interop.transforms import JoinedQKV


class ALGPT2(GPT2):
    """GPT-2 with ALBERT's layer sharing and factorized embedding (Lan et al. 2019, arXiv:1909.11942)."""

    name = "ALGPT2LMHeadModel"
    model_type = "algpt2"
    modeling_file = "modeling_algpt2.py"

    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what the class cannot express: what GPT-2 cannot, other than shared layers and the embedding's size."""
        yield from super().problems(replace(model, share_layers="", embedding_size=0))

    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model of an ALGPT2Config."""
        code = keys.path.with_name(self.modeling_file)
        if not is_unchanged(code):
            raise CheckpointError(
                f"{code} is {'not the modeling file of this version' if code.exists() else 'missing'}",
                rule="The code of a folder is executed only if it is known",
                fix=f"If megatron_lite exported the folder, copy {FOLDER / code.name} into it",
            )
        keys.pass_over("auto_map")
        model = super().read_config(keys)
        size, sharing = keys.take("embedding_size", default=0), keys.take("share_layers", default="all")
        if not isinstance(size, int) or not 0 <= size < model.hidden_size:
            raise keys.unsupported(
                "embedding_size", size, f"it must be 0, or below n_embd={model.hidden_size}", fix=DOWNLOAD
            )
        try:
            model = replace(model, embedding_size=size, share_layers=read_sharing([str(sharing)]) if sharing else "")
        except ValueError as expected:
            raise keys.unsupported("share_layers", sharing, f"expected {expected}", fix=DOWNLOAD) from None
        if (groups := num_groups(model)) and model.num_layers % groups:
            raise keys.unsupported(
                "share_layers", sharing, f"it does not divide n_layer={model.num_layers}", fix=DOWNLOAD
            )
        return model

    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the keys of ALGPT2Config."""
        module = self.modeling_file.removesuffix(".py")
        return {
            **super().write_config(model, positions),
            "auto_map": {"AutoConfig": f"{module}.ALGPT2Config", "AutoModelForCausalLM": f"{module}.{self.name}"},
            "embedding_size": model.embedding_size,
            "share_layers": model.share_layers,
        }

    def table(self, model: ModelConfig) -> Iterator[Entry]:
        """Yield the entries; parts of a layer are stored under the first layer that uses them, here as there."""
        yield Entry(WORD_EMBEDDINGS, ("transformer.wte.weight",))
        yield Entry("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
        if model.embedding_size:
            yield from linear("embedding.projection", "transformer.input_projection", bias=True)
            yield from linear("output_projection", "transformer.output_projection", bias=True)
        order = JoinedQKV(qkv(model))
        for number in range(model.num_layers):
            ours, theirs = f"decoder.layers.{number}", f"transformer.h.{number}"
            entries = [
                *norms(model, f"{ours}.input_norm", f"{theirs}.ln_1"),
                Entry(f"{ours}.self_attention.qkv.weight", (f"{theirs}.attn.c_attn.weight",), order),
                Entry(f"{ours}.self_attention.qkv.bias", (f"{theirs}.attn.c_attn.bias",), order),
                *linear(f"{ours}.self_attention.proj", f"{theirs}.attn.c_proj", bias=True),
                *norms(model, f"{ours}.pre_mlp_norm", f"{theirs}.ln_2"),
                *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc", bias=True),
                *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj", bias=True),
            ]
            yield from (entry for entry in entries if stored_name(model, entry.ours) == entry.ours)
        yield from norms(model, "decoder.final_norm", "transformer.ln_f")
