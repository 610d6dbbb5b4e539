"""Name tables of Megatron-LM and DeepSpeed formats: tensor names of each format for our module names.

Tensors are split over tensor-parallel ranks as ours are (NamedParameter.tp_dim), so a table holds names only; how the
rows of a rank's part lie is in arrangements.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_lite.errors import CheckpointError

_OURS_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_THEIRS_IN_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.+)")
FIRST_LAYER_FILE = 3
"""DeepSpeed pipeline: 00 and 02 are functions without parameters, 01 is the embedding, 03 the first layer."""
EMBEDDING_FILE = 1
_AFTER_LAYERS = 4
"""The final norm's number is that of layers + 4: a function without parameters precedes it."""


@dataclass(frozen=True)
class Scheme:
    """One naming scheme.

    Attributes:
        title: for messages.
        outside: our modules outside the layers, and theirs. `{final}` is the number of the final norm's file.
        layer: what their names of a layer begin with; `{n}` is the layer's number, `{file}` that of its file.
        modules: our modules within a layer, and theirs; one that ends in `_` is followed by `weight` without a dot.
        head_copies: names of the last stage's copy of a tied embedding.
    """

    title: str
    outside: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]
    head_copies: tuple[str, ...] = ()

    def theirs(self, ours: str, num_layers: int) -> str:
        """Return their name of a parameter.

        Raises:
            CheckpointError: the scheme has none.
        """
        match = _OURS_IN_LAYER.fullmatch(ours)
        if match:
            module = self.modules.get(match[2])
            prefix = self.layer.format(n=match[1], file=int(match[1]) + FIRST_LAYER_FILE) + "."
        else:
            module = self.outside.get(ours.rpartition(".")[0])
            prefix = ""
        if module is None:
            raise CheckpointError(
                f"{self.title} has no name for the tensor {ours}",
                fix="Use another --to, or --naming local",
            )
        separator = "" if module.endswith("_") else "."
        return prefix + module.format(final=final_norm_file(num_layers)) + separator + ours.rpartition(".")[2]

    def table(self, names: Iterable[str], num_layers: int) -> dict[str, str]:
        """Return our names and theirs."""
        return {name: self.theirs(name, num_layers) for name in names}


def final_norm_file(num_layers: int) -> int:
    """Return the number of the DeepSpeed layer file that holds the final norm."""
    return num_layers + _AFTER_LAYERS


_LEGACY_LAYER = {
    "input_norm": "input_layernorm",
    "self_attention.qkv": "self_attention.query_key_value",
    "self_attention.proj": "self_attention.dense",
    "pre_mlp_norm": "post_attention_layernorm",
    "mlp.fc1": "mlp.dense_h_to_4h",
    "mlp.fc2": "mlp.dense_4h_to_h",
}
_CORE_LAYER = {
    "input_norm": "input_layernorm",
    "self_attention.qkv": "self_attention.linear_qkv",
    "self_attention.proj": "self_attention.linear_proj",
    "self_attention.q_norm": "self_attention.q_layernorm",
    "self_attention.k_norm": "self_attention.k_layernorm",
    "pre_mlp_norm": "pre_mlp_layernorm",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
}
_CORE_OUTSIDE = {
    "embedding.word_embeddings": "embedding.word_embeddings",
    "embedding.position_embeddings": "embedding.position_embeddings",
    "decoder.final_norm": "decoder.final_layernorm",
    "output_layer": "output_layer",
}

LEGACY = Scheme(
    "Megatron-LM's legacy naming",
    {
        "embedding.word_embeddings": "language_model.embedding.word_embeddings",
        "embedding.position_embeddings": "language_model.embedding.position_embeddings",
        "embedding.norm": "language_model.embedding.word_embeddings.norm",
        "decoder.final_norm": "language_model.encoder.final_layernorm",
        "output_layer": "language_model.output_layer",
    },
    "language_model.encoder.layers.{n}",
    _LEGACY_LAYER,
    ("word_embeddings_for_head.weight",),
)
CORE_LOCAL = Scheme(
    "megatron-core's naming (local layers)",
    _CORE_OUTSIDE,
    "decoder.layers.{n}",
    _CORE_LAYER,
    ("output_layer.weight",),
)
CORE_TE = Scheme(
    "megatron-core's naming (Transformer Engine layers)",
    _CORE_OUTSIDE,
    "decoder.layers.{n}",
    {
        **_CORE_LAYER,
        "input_norm": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_norm": "mlp.linear_fc1.layer_norm_",
    },
    ("output_layer.weight",),
)
DEEPSPEED = Scheme(
    "DeepSpeed's layer naming",
    {
        "embedding.word_embeddings": f"{EMBEDDING_FILE}.word_embeddings",
        "embedding.position_embeddings": f"{EMBEDDING_FILE}.position_embeddings",
        "embedding.norm": f"{EMBEDDING_FILE}.word_embeddings.norm",
        "decoder.final_norm": "{final}",
    },
    "{file}",
    _LEGACY_LAYER,
)

NAMINGS = {"legacy": LEGACY, "local": CORE_LOCAL, "transformer-engine": CORE_TE}
"""Values of --naming."""

_ALIASES = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"^language_model\.transformer\."), "language_model.encoder."),
    (re.compile(r"(\.layers\.\d+)\.attention\."), r"\1.self_attention."),
    (re.compile(r"^(language_model\..*\.)(input|post_attention|final)_norm\."), r"\1\2_layernorm."),
    (re.compile(r"^language_model\.word_embeddings_for_head\."), "word_embeddings_for_head."),
)
"""Spellings of other versions of Megatron-LM, and the ones that the tables have."""
NO_PARAMETERS = re.compile(r"(.*\.)?_extra_state(/.*)?|.*\.rotary_(pos_)?emb\.inv_freq")
"""Entries of a state dict that hold no parameters: Transformer Engine's fp8 state, rotary frequencies."""


def canonical(name: str) -> str:
    """Return a name as the tables spell it."""
    for pattern, spelling in _ALIASES:
        name = pattern.sub(spelling, name)
    return name


def detect(names: Iterable[str]) -> Scheme:
    """Return the scheme of a Megatron-LM state dict's canonical names."""
    names = list(names)
    if any(name.startswith("language_model.") for name in names):
        return LEGACY
    fused = any(name.endswith("linear_qkv.layer_norm_weight") for name in names)
    return CORE_TE if fused else CORE_LOCAL


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Return prefix, layer number and rest of one of their names; None: it is outside the layers."""
    match = _THEIRS_IN_LAYER.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None
