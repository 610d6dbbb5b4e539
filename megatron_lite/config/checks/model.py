"""Validation rules for the model's dimensions."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checks.bounds import at_least, divisors, nearest_multiples, share
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def sizes_are_positive(config: RunConfig) -> Iterator[ConfigError]:
    """Yield sizes without which nothing else can be judged."""
    model = config.model
    yield from at_least(
        1,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
    )
    yield from at_least(0, kv_channels=model.head_dim, vocab_size=config.tokenizer.vocab_size)
    yield from at_least(0, max_position_embeddings=model.max_position_embeddings, init_method_std=model.init_std)
    yield from at_least(0, pad_vocab_size_to=model.padded_vocab_size, tokenizer_vocab_size=model.vocab_size)


def heads_divide_hidden_size(config: RunConfig) -> Iterator[ConfigError]:
    """Without --kv-channels a head has hidden size / heads channels, which must come out even."""
    model = config.model
    follows = model.head_dim == model.hidden_size // model.num_attention_heads
    if follows and model.hidden_size % model.num_attention_heads:
        yield ConfigError(
            "The attention heads must divide the hidden size",
            found=f"--hidden-size {model.hidden_size}, --num-attention-heads {model.num_attention_heads}",
            fix=f"Give --hidden-size {nearest_multiples(model.hidden_size, model.num_attention_heads)}, another "
            "number of heads, or a head's own size with --kv-channels",
        )


def groups_divide_heads(config: RunConfig) -> Iterator[ConfigError]:
    """Each key/value head serves equally many query heads."""
    model = config.model
    if model.num_attention_heads % model.num_query_groups:
        yield ConfigError(
            "The query groups must divide the attention heads",
            found=f"--num-query-groups {model.num_query_groups}, --num-attention-heads {model.num_attention_heads}",
            fix=f"Give --num-query-groups {divisors(model.num_attention_heads)}",
        )


def rotated_channels_are_pairs(config: RunConfig) -> Iterator[ConfigError]:
    """Rotary positions turn channels pairwise."""
    model = config.model
    if model.position_embedding != "rotary":
        return
    yield from share(rotary_percent=model.rotary_percent)
    yield from at_least(1, rotary_base=model.rotary_base)
    rotated = int(model.head_dim * model.rotary_percent)
    if rotated % 2 or not rotated:
        yield ConfigError(
            "Rotary positions rotate an even number of channels of a head",
            found=f"{rotated} of {model.head_dim} (--rotary-percent {model.rotary_percent:g})",
            fix="Change --rotary-percent, --kv-channels or --num-attention-heads",
        )
    if model.rotary_scaling <= 0:
        yield ConfigError(
            "Positions are divided by a positive number",
            found=f"--rotary-seq-len-interpolation-factor {model.rotary_scaling:g}",
            fix="Give a factor above 0, such as 2 for sequences of twice the trained length, or leave it out",
        )


def sequence_fits_positions(config: RunConfig) -> Iterator[ConfigError]:
    """A learned position table has a row for every position."""
    model, length = config.model, config.batch.seq_length
    if model.position_embedding == "learned" and length > model.max_position_embeddings:
        yield ConfigError(
            "The sequence must not be longer than the position table",
            found=f"--seq-length {length}, --max-position-embeddings {model.max_position_embeddings}",
            fix=f"Give --max-position-embeddings {length}, or use --position-embedding-type rotary",
        )


def one_kind_of_residual(config: RunConfig) -> Iterator[ConfigError]:
    """Yield an error where the residual is asked for in two ways."""
    if config.model.parallel_residual and config.model.residual_post_layernorm:
        yield ConfigError(
            "A layer's residual is either parallel or branches off after the norm",
            found="--parallel-residual and --apply-residual-connection-post-layernorm",
            fix="Leave one of them out",
        )


def probabilities(config: RunConfig) -> Iterator[ConfigError]:
    """Dropouts are probabilities below 1."""
    model = config.model
    yield from share(open_end=True, hidden_dropout=model.hidden_dropout, attention_dropout=model.attention_dropout)
    if model.norm_epsilon <= 0:
        yield ConfigError(
            "The norms' epsilon is positive",
            found=f"--norm-epsilon {model.norm_epsilon:g}",
            fix="Give a small number above 0, such as 1e-5, or leave it out",
        )


RULES = (
    heads_divide_hidden_size,
    groups_divide_heads,
    rotated_channels_are_pairs,
    sequence_fits_positions,
    one_kind_of_residual,
    probabilities,
)
