"""Parameter and FLOP counts of a model, from its config."""

from __future__ import annotations

from megatron_lite.config.model import ModelConfig


def norm_parameters(model: ModelConfig, channels: int) -> int:
    """Weight of one norm, and bias if it is a LayerNorm."""
    return channels * (2 if model.normalization == "LayerNorm" else 1)


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one transformer layer."""
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
    """Parameters before the first layer, with `rows` rows in the word embedding."""
    positions = model.max_position_embeddings if model.position_embedding == "learned" else 0
    norm = norm_parameters(model, model.hidden_size) if model.embed_layernorm else 0
    return (rows + positions) * model.hidden_size + norm


def head_parameters(model: ModelConfig, rows: int) -> int:
    """Parameters after the last layer: the final norm, and the output layer unless it is the embedding."""
    return norm_parameters(model, model.hidden_size) + (0 if model.tied_embeddings else rows * model.hidden_size)


def parameter_count(model: ModelConfig, rows: int | None = None) -> int:
    """Exact number of parameters.

    Args:
        model: the model's shape.
        rows: rows of the word embedding; None: the vocabulary, or the padded one where only that is known. Padding
            rows are zero, are never saved, and are not parameters of the model.
    """
    if rows is None:
        rows = model.vocab_size or model.padded_vocab_size
    return embedding_parameters(model, rows) + model.num_layers * layer_parameters(model) + head_parameters(model, rows)


def layer_forward_flops(model: ModelConfig, seq_length: int) -> int:
    """FLOPs of one layer's forward for one token of a sequence: matrix products only, two a multiply-add.

    Attention is counted over the full square although half of it is masked (Narayanan et al. 2021, arXiv:2104.04473).
    """
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    attention = hidden * (2 * queries + 2 * model.num_query_groups * model.head_dim) + 2 * seq_length * queries
    return 2 * (attention + hidden * model.ffn_hidden_size * (3 if model.gated else 2))


def head_forward_flops(model: ModelConfig) -> int:
    """FLOPs of the output layer's forward for one token."""
    return 2 * model.hidden_size * (model.padded_vocab_size or model.vocab_size)


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Model FLOPs to train on one token, forward and backward (twice forward).

    Recomputed work does not count (PaLM's appendix B, Chowdhery et al. 2022, arXiv:2204.02311): MFU rests on this.
    For a GPT-2 (heads × head_dim = h, ffn 4h) this is eq. 3 of Narayanan et al. 2021 with three passes in place of
    four: 72 l h² (1 + s / 6h + V / 12lh).
    """
    return 3 * (model.num_layers * layer_forward_flops(model, seq_length) + head_forward_flops(model))
