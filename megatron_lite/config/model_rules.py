"""Model config rules: fields that are derived from other fields, and checks that fields are consistent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_lite.config.divisors import divisors, nearest_multiples
from megatron_lite.config.flag import FIELD
from megatron_lite.config.sharing import num_groups
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig


def resolve_query_groups(given: Given) -> None:
    """Apply --group-query-attention: Megatron-LM reads --num-query-groups only with it, and defaults to one group."""
    run = given.run
    if run.command.group_query_attention:
        if not given.has(FIELD.model.num_query_groups):
            given.give(FIELD.model.num_query_groups, 1, "--group-query-attention")
    elif run.model.num_query_groups != run.model.num_attention_heads:
        given.warnings.append(
            f"{given.origin(FIELD.model.num_query_groups)} turns on grouped-query attention; Megatron-LM would ignore "
            "it without --group-query-attention"
        )


def resolve_positions(given: Given) -> None:
    """Apply --no-position-embedding; size the learned position table by the sequence."""
    origin = given.origin(FIELD.model.position_embedding)
    if given.run.command.no_position_embedding:
        if not origin:
            given.give(FIELD.model.position_embedding, "none", "--no-position-embedding")
        elif given.run.model.position_embedding == "learned":
            given.refuse_both("--no-position-embedding", origin)
        else:
            given.notes.append("--no-position-embedding has no effect: there is no learned table to leave out")
    model, length = given.run.model, given.run.batch.seq_length
    if model.position_embedding == "learned" and not model.max_position_embeddings and length:
        given.give(FIELD.model.max_position_embeddings, length, "--seq-length")


def resolve_activation(given: Given) -> None:
    """Apply --no-bias-gelu-fusion: Megatron's fused GELU is the tanh approximation, the unfused one is exact."""
    origin = given.origin(FIELD.model.activation)
    if not given.run.command.erf_gelu:
        return
    if not origin:
        given.give(FIELD.model.activation, "gelu", "--no-bias-gelu-fusion")
        given.notes.append("--no-bias-gelu-fusion is read as --activation gelu")
    elif given.run.model.activation == "gelu_tanh":
        given.refuse_both("--no-bias-gelu-fusion (the exact GELU)", origin)
    else:
        given.notes.append(f"--no-bias-gelu-fusion has no effect under {origin}")


def resolve_qkv_bias(given: Given) -> None:
    """Derive the bias of queries, keys and values from that of the other linear layers."""
    if not given.has(FIELD.model.qkv_bias) and (origin := given.origin(FIELD.model.linear_bias)):
        given.give(FIELD.model.qkv_bias, given.run.model.linear_bias, origin)


RESOLVERS = (resolve_query_groups, resolve_positions, resolve_activation, resolve_qkv_bias)


def heads_divide_hidden_size(config: RunConfig) -> Iterator[ConfigError]:
    """Require heads that divide the hidden size, unless --kv-channels is given."""
    model = config.model
    follows = model.head_dim == model.hidden_size // model.num_attention_heads
    if follows and model.hidden_size % model.num_attention_heads:
        yield ConfigError(
            f"Cannot split a hidden size of {model.hidden_size} over {model.num_attention_heads} attention heads "
            f"(--hidden-size {model.hidden_size}, --num-attention-heads {model.num_attention_heads})",
            fix=f"Use --hidden-size {nearest_multiples(model.hidden_size, model.num_attention_heads)}, another "
            "number of heads, or an explicit head size with --kv-channels",
        )


def groups_divide_heads(config: RunConfig) -> Iterator[ConfigError]:
    """Require equally many query heads for each key/value head."""
    model = config.model
    if model.num_attention_heads % model.num_query_groups:
        yield ConfigError(
            f"Cannot split {model.num_attention_heads} attention heads into {model.num_query_groups} query groups "
            f"(--num-query-groups {model.num_query_groups}, --num-attention-heads {model.num_attention_heads})",
            fix=f"Use --num-query-groups {divisors(model.num_attention_heads)}",
        )


def rotated_channels_are_pairs(config: RunConfig) -> Iterator[ConfigError]:
    """Require an even number of rotated channels."""
    model = config.model
    rotated = int(model.head_dim * model.rotary_percent)
    even = max(2, (rotated + 1) // 2 * 2)
    if model.position_embedding == "rotary" and (rotated % 2 or not rotated):
        yield ConfigError(
            f"Rotary embeddings cannot rotate {rotated} of the {model.head_dim} channels of an attention head "
            f"(--rotary-percent {model.rotary_percent:g})",
            rule="They rotate pairs of channels, at least one pair",
            fix=f"Use --rotary-percent {even / model.head_dim:g} ({even} channels), or another head size with "
            "--kv-channels"
            if model.head_dim % 2 == 0
            else "Use an even head size: set --kv-channels",
        )


def sequence_fits_positions(config: RunConfig) -> Iterator[ConfigError]:
    """Require a row of the learned position table for every position."""
    model, length = config.model, config.batch.seq_length
    if model.position_embedding == "learned" and length > model.max_position_embeddings:
        yield ConfigError(
            f"Samples of {length} tokens are longer than the table of {model.max_position_embeddings} learned "
            "positions "
            f"(--seq-length {length}, --max-position-embeddings {model.max_position_embeddings})",
            fix=f"Use --max-position-embeddings {length}, or --position-embedding-type rotary",
        )


def one_kind_of_residual(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse two kinds of residual connection."""
    if config.model.parallel_residual and config.model.residual_post_layernorm:
        yield ConfigError(
            "--parallel-residual and --apply-residual-connection-post-layernorm contradict each other",
            fix="Remove either flag",
        )


def groups_divide_layers(config: RunConfig) -> Iterator[ConfigError]:
    """Require groups of equally many layers."""
    layers, groups = config.model.num_layers, num_groups(config.model)
    if groups and layers % groups:
        yield ConfigError(
            f"Cannot divide {layers} layers into {groups} groups that share parameters (--share-layers {groups}, "
            f"--num-layers {layers})",
            fix=f"Use --share-layers {divisors(layers)}",
        )


def embedding_is_narrower(config: RunConfig) -> Iterator[ConfigError]:
    """Require a factorized embedding that is narrower than the hidden size."""
    model = config.model
    if model.embedding_size >= model.hidden_size:
        yield ConfigError(
            f"The embedding is not narrower than the layers (--embedding-size {model.embedding_size}, --hidden-size "
            f"{model.hidden_size})",
            rule="A factorized embedding saves parameters only below the hidden size",
            fix=f"Use an --embedding-size below {model.hidden_size}, or remove the flag for an embedding of the hidden "
            "size",
        )


RULES = (
    heads_divide_hidden_size,
    groups_divide_heads,
    rotated_channels_are_pairs,
    sequence_fits_positions,
    one_kind_of_residual,
    groups_divide_layers,
    embedding_is_narrower,
)
