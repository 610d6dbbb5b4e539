"""Parameter and FLOP formulas of a model, from its config; the run summary is in planner/summary.py."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import ParameterLayout, embedding_layouts, head_layouts, layer_layouts
from megatron_lite.config.sharing import PARTS, owner_layer


def layer_parameters(model: ModelConfig) -> dict[str, int]:
    """Return the parameters of one transformer layer, by its parts."""
    return {part: _elements(tensors) for part, tensors in layer_layouts(model).items()}


def stored_parameters(model: ModelConfig, layers: Iterable[int]) -> dict[int, int]:
    """Return the parameters that some layers use, by the number of the layer under which they are stored.

    Each is counted once, however many of the layers share it.
    """
    layers, counts = tuple(layers), layer_parameters(model)
    stored: dict[int, int] = {}
    for part in PARTS:
        for owner in dict.fromkeys(owner_layer(model, part, layer) for layer in layers):
            stored[owner] = stored.get(owner, 0) + counts[part]
    return stored


def embedding_parameters(model: ModelConfig, rows: int) -> int:
    """Return the parameters before the first layer, with `rows` rows in the word embedding."""
    return _elements(embedding_layouts(model)) + (rows - model.vocab_size) * model.embedding_width


def head_parameters(model: ModelConfig, rows: int) -> int:
    """Return the parameters after the last layer: final norm, projection, and output layer unless it is tied."""
    own = 0 if model.tied_embeddings else rows
    return _elements(head_layouts(model)) + (own - model.vocab_size) * model.embedding_width


def _elements(tensors: Iterable[tuple[str, ParameterLayout]]) -> int:
    return sum(prod(layout.shape) for _, layout in tensors)


def parameter_count(model: ModelConfig, rows: int | None = None) -> int:
    """Return the exact number of parameters.

    Args:
        model: the model's shape.
        rows: rows of the word embedding; None: the vocabulary, or the padded one where only that is known. Padding
            rows are zero, are never saved, and are not parameters of the model.
    """
    if rows is None:
        rows = model.vocab_size or model.padded_vocab_size
    layers = sum(stored_parameters(model, range(model.num_layers)).values())
    return embedding_parameters(model, rows) + layers + head_parameters(model, rows)


def layer_forward_flops(model: ModelConfig, seq_length: int) -> int:
    """Return the forward FLOPs of one layer for one token: matrix products only, two per multiply-add.

    Attention is counted over the full square although half of it is masked (Narayanan et al. 2021, arXiv:2104.04473).
    """
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    attention = hidden * (2 * queries + 2 * model.num_query_groups * model.head_dim) + 2 * seq_length * queries
    return 2 * (attention + hidden * model.ffn_hidden_size * (3 if model.gated else 2))


def head_forward_flops(model: ModelConfig) -> int:
    """Return the forward FLOPs of the output layer, and of the projection before it, for one token."""
    return 2 * model.embedding_width * model.vocab_rows + projection_flops(model)


def projection_flops(model: ModelConfig) -> int:
    """Return the FLOPs of one projection between a factorized embedding and the hidden size, for one token."""
    return 2 * model.embedding_size * model.hidden_size


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Return the model FLOPs to train on one token: forward, and backward as twice forward.

    Recomputation is not counted (PaLM, appendix B, Chowdhery et al. 2022, arXiv:2204.02311), as MFU requires.
    For a GPT-2 (heads × head_dim = h, ffn 4h) this is eq. 3 of Narayanan et al. 2021 with three passes instead of
    four: 72 l h² (1 + s / 6h + V / 12lh).
    """
    layers = model.num_layers * layer_forward_flops(model, seq_length)
    return 3 * (projection_flops(model) + layers + head_forward_flops(model))
