"""FP8 config: number formats, scaling, and layers that stay in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.divisors import nearest_multiples
from megatron_lite.config.flag import FIELD, Flag, option
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

ALIGNMENT = 16
"""The sizes of a product of 8-bit matrices are multiples of this (torch._scaled_mm)."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix products of the layers' linear layers in fp8; parameters and other operations are in bf16."""

    format: Literal["off", "e4m3", "hybrid"] = option(
        "off",
        Flag(
            "--fp8-format",
            "Matrix products of the layers in fp8, with --bf16: e4m3, or hybrid with gradients in e5m2.",
        ),
    )
    recipe: Literal["delayed", "tensorwise", "rowwise"] = option(
        "delayed",
        Flag(
            "--fp8-recipe",
            "Scales of fp8 operands: one for each tensor from earlier iterations (delayed), or one for each tensor or "
            "row from its present values.",
        ),
    )
    amax_history_len: int = option(
        1,
        Flag(
            "--fp8-amax-history-len", "Iterations whose largest values give the scales (delayed).", least=1, most=65536
        ),
    )
    amax_compute_algo: Literal["most_recent", "max"] = option(
        "most_recent",
        Flag("--fp8-amax-compute-algo", "Value of the history that gives the scale: the newest, or the largest."),
    )
    margin: int = option(
        0, Flag("--fp8-margin", "Multiply the scales by 2^N, as room for values that grow (delayed).", most=64)
    )
    bf16_ends: bool = option(
        False, Flag("--first-last-layers-bf16", "Leave the first and the last layers in bf16 with fp8.", sets=True)
    )
    bf16_start: int = option(
        1, Flag("--num-layers-at-start-in-bf16", "First layers that --first-last-layers-bf16 leaves in bf16.")
    )
    bf16_end: int = option(
        1, Flag("--num-layers-at-end-in-bf16", "Last layers that --first-last-layers-bf16 leaves in bf16.")
    )


def note_unused_options(given: Given) -> None:
    """Say which fp8 options have no effect: all without a format, those of the history on scales of present values."""
    fp8 = given.run.fp8
    history: dict[str, object] = {
        "--fp8-amax-history-len": FIELD.fp8.amax_history_len,
        "--fp8-amax-compute-algo": FIELD.fp8.amax_compute_algo,
        "--fp8-margin": FIELD.fp8.margin,
    }
    if fp8.format == "off":
        options = {"--fp8-recipe": FIELD.fp8.recipe, "--first-last-layers-bf16": FIELD.fp8.bf16_ends, **history}
        reason = "products are in fp8 only with --fp8-format"
    elif fp8.recipe != "delayed":
        options, reason = history, f"--fp8-recipe {fp8.recipe} takes the scales from the present values"
    else:
        return
    given.notes += [f"{name} has no effect: {reason}" for name, field in options.items() if given.has(field)]


def fp8_fits(config: RunConfig) -> Iterator[ConfigError]:
    """Require bf16, and sizes that 8-bit products take."""
    model, tp, cp, batch = config.model, config.parallel.tp, config.parallel.cp, config.batch
    if config.fp8.format == "off":
        return
    if config.precision.dtype != "bf16":
        yield ConfigError(
            f"--fp8-format {config.fp8.format} needs --bf16, because everything but the matrix products is in bf16; "
            f"the parameters are {config.precision.dtype}",
            fix="Add --bf16, or remove --fp8-format",
        )
    channels = f"--kv-channels {nearest_multiples(model.head_dim, ALIGNMENT)} (now {model.head_dim})"
    width = model.num_attention_heads * model.head_dim
    ffn, hidden, seq_length = model.ffn_hidden_size, model.hidden_size, batch.seq_length
    sizes = {
        "the hidden size": (
            hidden,
            f"--hidden-size {nearest_multiples(hidden, lcm(ALIGNMENT, model.num_attention_heads))} (now {hidden})",
        ),
        "the attention width per rank": (width // tp, channels),
        "the number of query, key and value channels per rank": (
            (width + 2 * model.num_query_groups * model.head_dim) // tp,
            channels,
        ),
        "the MLP width per rank": (
            ffn // tp,
            f"--ffn-hidden-size {nearest_multiples(ffn, ALIGNMENT * tp)} (now {ffn}, on {tp} tensor-parallel ranks)",
        ),
        "the number of tokens of a micro-batch" + (" per context-parallel rank" if cp > 1 else ""): (
            batch.micro_batch_size * seq_length // cp,
            f"--seq-length {nearest_multiples(seq_length, ALIGNMENT * cp)} (now {seq_length})",
        ),
    }
    for name, (size, remedy) in sizes.items():
        if size % ALIGNMENT:
            yield ConfigError(
                f"fp8 products need sizes that are multiples of {ALIGNMENT}, and {name} is {size} (--fp8-format)",
                fix=f"Use {remedy}, or remove --fp8-format",
            )


RESOLVERS = (note_unused_options,)
RULES = (fp8_fits,)
