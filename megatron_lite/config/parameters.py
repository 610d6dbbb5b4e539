"""Parameter table of a model: global name, global shape and tensor-parallel dim of each tensor, by pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.sharing import LAYERS, PARTS, owner_layer, shared_modules

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
"""Global name of the embedding's table, which is also the weight of a tied head."""
HEAD = "output_layer.weight"
"""Global name of the weight of a head that is not tied."""


class ParameterLayout(NamedTuple):
    """Global shape of a parameter, and the dim that tensor parallelism splits; None: every rank holds all of it."""

    shape: tuple[int, ...]
    tp_dim: int | None


_Named = Iterator[tuple[str, ParameterLayout]]


def parameter_layouts(model: ModelConfig) -> dict[str, ParameterLayout]:
    """Return the layout of every parameter, by name, in the model's order; the vocabulary is not padded."""
    return stage_parameters(model, range(model.num_layers))


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every parameter, by name, in the model's order; the vocabulary is not padded."""
    return {name: layout.shape for name, layout in parameter_layouts(model).items()}


def stage_parameters(model: ModelConfig, layers: range) -> dict[str, ParameterLayout]:
    """Return the parameters of a pipeline stage by global name, each once, in the order of the forward pass.

    Args:
        model: the model.
        layers: those of the stage. The stage of layer 0 has the embedding, that of the last layer the head.
    """
    found: dict[str, ParameterLayout] = dict(embedding_layouts(model)) if layers.start == 0 else {}
    tensors = layer_layouts(model)
    for layer in layers:
        for part in PARTS:
            prefix = f"{LAYERS}.{owner_layer(model, part, layer)}.{part}"
            for suffix, layout in tensors[part]:
                found.setdefault(f"{prefix}.{suffix}", layout)
    if layers.stop == model.num_layers:
        for name, layout in head_layouts(model):
            found.setdefault(name, layout)
    return found


def shared_stages(model: ModelConfig, stages: Sequence[range]) -> dict[str, tuple[int, ...]]:
    """Return the stages that hold each module that several stages share, by global name, the owner first.

    These are the two ends of a tied table, and shared layers.

    Args:
        model: the model.
        stages: layers of every stage.
    """
    last = len(stages) - 1
    holders: dict[str, tuple[int, ...]] = {WORD_EMBEDDINGS: (0, last)} if model.tied_embeddings and last else {}
    for name, layers in shared_modules(model).items():
        found = tuple(stage for stage, own in enumerate(stages) if any(layer in layers for layer in own))
        if len(found) > 1:
            holders[name] = found
    return holders


def embedding_layouts(model: ModelConfig) -> _Named:
    """Yield the parameters before the first layer."""
    width, hidden = model.embedding_width, model.hidden_size
    yield WORD_EMBEDDINGS, ParameterLayout((model.vocab_size, width), 0)
    if model.position_embedding == "learned":
        shape = (model.max_position_embeddings, width)
        yield "embedding.position_embeddings.weight", ParameterLayout(shape, None)
    if model.embed_layernorm:
        yield from _norm("embedding.norm", width, bias=True)
    if model.embedding_size:
        yield from _replicated("embedding.projection", hidden, width, bias=model.linear_bias)


def head_layouts(model: ModelConfig) -> _Named:
    """Yield the parameters after the last layer; a tied head is the embedding's table."""
    width, hidden = model.embedding_width, model.hidden_size
    yield from _norm("decoder.final_norm", hidden, bias=_has_bias(model))
    if model.embedding_size:
        yield from _replicated("output_projection", width, hidden, bias=model.linear_bias)
    yield WORD_EMBEDDINGS if model.tied_embeddings else HEAD, ParameterLayout((model.vocab_size, width), 0)


@lru_cache(maxsize=16)
def layer_layouts(model: ModelConfig) -> dict[str, tuple[tuple[str, ParameterLayout], ...]]:
    """Return the parameters of one layer, by part (PARTS)."""
    norm = tuple((name[1:], layout) for name, layout in _norm("", model.hidden_size, _has_bias(model)))
    return {
        "input_norm": norm,
        "self_attention": tuple(_attention(model)),
        "pre_mlp_norm": norm,
        "mlp": tuple(_mlp(model)),
    }


def _attention(model: ModelConfig) -> _Named:
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
    channels = width + 2 * model.num_query_groups * model.head_dim
    yield "qkv.weight", ParameterLayout((channels, hidden), 0)
    if model.qkv_bias:
        yield "qkv.bias", ParameterLayout((channels,), 0)
    yield "proj.weight", ParameterLayout((hidden, width), 1)
    if model.linear_bias:
        yield "proj.bias", ParameterLayout((hidden,), None)
    if model.qk_layernorm:
        for name in ("q_norm", "k_norm"):
            yield from _norm(name, model.head_dim, _has_bias(model))


def _mlp(model: ModelConfig) -> _Named:
    hidden, width = model.hidden_size, model.ffn_hidden_size
    lead = (2,) if model.gated else ()
    yield "fc1.weight", ParameterLayout((*lead, width, hidden), len(lead))
    if model.linear_bias:
        yield "fc1.bias", ParameterLayout((*lead, width), len(lead))
    yield "fc2.weight", ParameterLayout((hidden, width), 1)
    if model.linear_bias:
        yield "fc2.bias", ParameterLayout((hidden,), None)


def _has_bias(model: ModelConfig) -> bool:
    return model.normalization == "LayerNorm"


def _norm(name: str, size: int, bias: bool) -> _Named:
    for suffix in ("weight", "bias") if bias else ("weight",):
        yield f"{name}.{suffix}", ParameterLayout((size,), None)


def _replicated(name: str, out_channels: int, in_channels: int, *, bias: bool) -> _Named:
    yield f"{name}.weight", ParameterLayout((out_channels, in_channels), None)
    if bias:
        yield f"{name}.bias", ParameterLayout((out_channels,), None)
