"""Parameter and FLOP formulas of a model, from its config; the run summary is in planner/summary.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lite.config.model import ModelConfig

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


def norm_parameters(model: ModelConfig, channels: int) -> int:
    """Return the parameters of one norm: weight, and bias of a LayerNorm."""
    return channels * (2 if model.normalization == "LayerNorm" else 1)


def layer_parameters(model: ModelConfig) -> int:
    """Return the parameters of one transformer layer."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.head_dim
    qkv = queries + 2 * model.num_query_groups * model.head_dim
    up = 2 * ffn if model.gated else ffn
    weights = hidden * qkv + queries * hidden + hidden * up + ffn * hidden
    biases = (qkv if model.qkv_bias else 0) + (2 * hidden + up if model.linear_bias else 0)
    norms = 2 * norm_parameters(model, hidden)
    if model.qk_layernorm:
        norms += 2 * norm_parameters(model, model.head_dim)
    return weights + biases + norms


def embedding_parameters(model: ModelConfig, rows: int) -> int:
    """Return the parameters before the first layer, with `rows` rows in the word embedding."""
    positions = model.max_position_embeddings if model.position_embedding == "learned" else 0
    norm = norm_parameters(model, model.hidden_size) if model.embed_layernorm else 0
    return (rows + positions) * model.hidden_size + norm


def head_parameters(model: ModelConfig, rows: int) -> int:
    """Return the parameters after the last layer: final norm, and output layer unless it is tied to the embedding."""
    return norm_parameters(model, model.hidden_size) + (0 if model.tied_embeddings else rows * model.hidden_size)


def parameter_count(model: ModelConfig, rows: int | None = None) -> int:
    """Return the exact number of parameters.

    Args:
        model: the model's shape.
        rows: rows of the word embedding; None: the vocabulary, or the padded one where only that is known. Padding
            rows are zero, are never saved, and are not parameters of the model.
    """
    if rows is None:
        rows = model.vocab_size or model.padded_vocab_size
    return embedding_parameters(model, rows) + model.num_layers * layer_parameters(model) + head_parameters(model, rows)


def checkpoint_size(config: RunConfig) -> int:
    """Return the bytes of a checkpoint: weights, fp32 main parameters, and Adam's two moments in fp32."""
    full = config.precision.dtype == "fp32"
    state = (8 if full else 12) if config.checkpoint.save_optimizer else 0
    return parameter_count(config.model) * ((4 if full else 2) + state)


def layer_forward_flops(model: ModelConfig, seq_length: int) -> int:
    """Return the forward FLOPs of one layer for one token: matrix products only, two per multiply-add.

    Attention is counted over the full square although half of it is masked (Narayanan et al. 2021, arXiv:2104.04473).
    """
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    attention = hidden * (2 * queries + 2 * model.num_query_groups * model.head_dim) + 2 * seq_length * queries
    return 2 * (attention + hidden * model.ffn_hidden_size * (3 if model.gated else 2))


def head_forward_flops(model: ModelConfig) -> int:
    """Return the forward FLOPs of the output layer for one token."""
    return 2 * model.hidden_size * (model.padded_vocab_size or model.vocab_size)


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Return the model FLOPs to train on one token: forward, and backward as twice forward.

    Recomputation is not counted (PaLM, appendix B, Chowdhery et al. 2022, arXiv:2204.02311), as MFU requires.
    For a GPT-2 (heads × head_dim = h, ffn 4h) this is eq. 3 of Narayanan et al. 2021 with three passes instead of
    four: 72 l h² (1 + s / 6h + V / 12lh).
    """
    return 3 * (model.num_layers * layer_forward_flops(model, seq_length) + head_forward_flops(model))
