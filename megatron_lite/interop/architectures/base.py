"""Base class of the Hugging Face mappings: config.json to and from ModelConfig, tensor table, unsupported models."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_lite.config.model import Activation, ModelConfig
from megatron_lite.config.parameters import HEAD, WORD_EMBEDDINGS
from megatron_lite.config.sharing import shared_modules
from megatron_lite.interop.architectures.keys import ConfigKeys
from megatron_lite.interop.mapping import Entry
from megatron_lite.interop.transforms import PlusOne, Rows, Same, SplitQKV, Transform

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "relu2": "squared_relu",
}
"""Names of plain activations in config.json. gelu_tanh and gelu differ by 2e-4 in the logits of a small model."""

GATED: Mapping[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_python": "geglu",
    "relu": "reglu",
    "linear": "liglu",
}
"""The same for the activation of a gated MLP's gate."""


class Architecture(ABC):
    """One Hugging Face class.

    Attributes:
        name: the class, as `architectures` of config.json spells it.
        model_type: config.json's.
        prefix: what files that were saved from the model without its head lack in front of every name.
        head: their name of an untied head.
        ignored: tensors in public files that are no parameters.
        exports: whether models are written as this class.
    modeling_file: the file of remote_code/ with the class; empty: transformers has it.
    """

    name: str
    model_type: str
    prefix: str
    head: str = "lm_head.weight"
    ignored: Sequence[re.Pattern[str]] = ()
    exports: bool = True
    modeling_file: str = ""

    @abstractmethod
    def problems(self, model: ModelConfig) -> Iterator[str]:
        """Yield what of a model the class cannot express, each with the flag that asks for it."""

    @abstractmethod
    def read_config(self, keys: ConfigKeys) -> ModelConfig:
        """Return the model that a config.json describes; keys it does not take are the caller's to account for."""

    @abstractmethod
    def write_config(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the class's own keys of config.json.

        Args:
            model: the model.
            positions: the longest sequence.
        """

    @abstractmethod
    def table(self, model: ModelConfig) -> Iterator[Entry]:
        """Yield the entries of all parameters but an untied head."""

    def entries(self, model: ModelConfig, rows: int = 0) -> list[Entry]:
        """Return the entries of all parameters.

        Args:
            model: the model.
            rows: rows of their vocabulary tables, if these are padded.
        """
        found = list(self.table(model))
        if not model.tied_embeddings:
            found.append(Entry(HEAD, (self.head,)))
        if rows > model.vocab_size:
            tables = (WORD_EMBEDDINGS, HEAD)
            found = [replace(entry, transform=Rows(rows)) if entry.ours in tables else entry for entry in found]
        return found


def norm(model: ModelConfig) -> Transform:
    """Return the transform of a norm's weight."""
    return PlusOne() if model.zero_centered_norm else Same()


def norms(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    """Yield a norm's weight, and its bias if it has one."""
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",), norm(model))
    if model.normalization == "LayerNorm":
        yield Entry(f"{ours}.bias", (f"{theirs}.bias",))


def qkv(model: ModelConfig) -> SplitQKV:
    """Return the transform between our query/key/value rows and three tensors."""
    groups = model.num_query_groups
    return SplitQKV(groups, model.num_attention_heads // groups, model.head_dim)


def linear(ours: str, theirs: str, *, bias: bool, transform: Transform | None = None) -> Iterator[Entry]:
    """Yield a linear layer's weight and bias."""
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",), transform or Same())
    if bias:
        yield Entry(f"{ours}.bias", (f"{theirs}.bias",))


def activation_name(model: ModelConfig, names: Mapping[str, Activation]) -> str:
    """Return config.json's name of the model's activation: the first in the table."""
    return next(name for name, ours in names.items() if ours == model.activation)


def read_activation(keys: ConfigKeys, key: str, names: Mapping[str, Activation], default: str) -> Activation:
    """Return the model's activation."""
    value = keys.take(key, default=default)
    if value not in names:
        raise keys.unsupported(key, value, f"the MLP can have {', '.join(names)}")
    return names[value]


def read_dropout(keys: ConfigKeys, *names: str, default: float) -> float:
    """Return a dropout: the largest of several that are one flag here. A trained model's function has none."""
    return max(float(keys.take(name, default=default)) for name in names)


def read_tied(keys: ConfigKeys, default: bool) -> bool:
    """Return whether the head shares the embedding's table."""
    return bool(keys.take("tie_word_embeddings", default=default))


def requires(model: ModelConfig, wanted: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    """Yield the flags of those fields of a model that do not have the one value that a class can express."""
    for field, (value, flag) in wanted.items():
        if getattr(model, field) != value:
            yield flag


def sharing_problems(model: ModelConfig) -> Iterator[str]:
    """Yield the flags by which a model has shared layers or a factorized embedding, which few formats can express."""
    if shared_modules(model):
        yield f"--share-layers {model.share_layers}"
    if model.embedding_size:
        yield f"--embedding-size {model.embedding_size}"


def megatron_layers(model: ModelConfig, layers: str, attention: str) -> Iterator[Entry]:
    """Yield the entries of layers that have Megatron's names and its order of QKV rows.

    Args:
        model: the model.
        layers: their prefix of a layer's number.
        attention: their name of the attention block.
    """
    for number in range(model.num_layers):
        ours, theirs = f"decoder.layers.{number}", f"{layers}.{number}"
        yield from norms(model, f"{ours}.input_norm", f"{theirs}.input_layernorm")
        for mine, name in (
            ("self_attention.qkv", f"{attention}.query_key_value"),
            ("self_attention.proj", f"{attention}.dense"),
            ("mlp.fc1", "mlp.dense_h_to_4h"),
            ("mlp.fc2", "mlp.dense_4h_to_h"),
        ):
            yield from linear(f"{ours}.{mine}", f"{theirs}.{name}", bias=True)
        yield from norms(model, f"{ours}.pre_mlp_norm", f"{theirs}.post_attention_layernorm")


def biased_layer_norm_problems(model: ModelConfig, positions: str) -> Iterator[str]:
    """Yield what of a model a class with LayerNorm, biases everywhere and plain attention heads cannot express.

    Args:
        model: the model.
        positions: the class's position embedding.
    """
    yield from sharing_problems(model)
    if model.position_embedding != positions:
        yield f"{model.position_embedding} positions (--position-embedding-type)"
    yield from requires(
        model,
        {
            "normalization": ("LayerNorm", "--normalization RMSNorm"),
            "num_query_groups": (model.num_attention_heads, "--num-query-groups"),
            "linear_bias": (True, "--disable-bias-linear"),
            "qkv_bias": (True, "--disable-qkv-bias"),
            "qk_layernorm": (False, "--qk-layernorm"),
        },
    )
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        yield f"heads of {model.head_dim} channels (--kv-channels)"
