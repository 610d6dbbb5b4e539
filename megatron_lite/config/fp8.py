"""FP8 config: number formats, scaling, and layers that stay in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
    recipe: Literal["tensorwise", "rowwise"] = option(
        "tensorwise", Flag("--fp8-recipe", "Scales of fp8 operands: one for each tensor, or one for each row.")
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


def note_scaling(given: Given) -> None:
    """Say which scaling is used where Megatron's default is another one."""
    fp8 = given.run.fp8
    if fp8.format != "off" and not given.has(FIELD.fp8.recipe):
        given.notes.append(
            "--fp8-format without --fp8-recipe scales each tensor by its present values (tensorwise); Megatron's "
            "default takes the values of earlier iterations (delayed)"
        )


def fp8_fits(config: RunConfig) -> Iterator[ConfigError]:
    """Require bf16, and sizes that 8-bit products take."""
    model, tp, batch = config.model, config.parallel.tp, config.batch
    if config.fp8.format == "off":
        return
    if config.precision.dtype != "bf16":
        yield ConfigError(
            f"--fp8-format {config.fp8.format} needs --bf16, because everything but the matrix products is in bf16; "
            f"the parameters are {config.precision.dtype}",
            fix="Add --bf16, or remove --fp8-format",
        )
    width = model.num_attention_heads * model.head_dim
    sizes = {
        "the hidden size": (model.hidden_size, "--hidden-size"),
        "the attention width per rank": (width // tp, "--kv-channels or the tensor-parallel size"),
        "the number of query, key and value channels per rank": (
            (width + 2 * model.num_query_groups * model.head_dim) // tp,
            "--kv-channels or the tensor-parallel size",
        ),
        "the MLP width per rank": (model.ffn_hidden_size // tp, "--ffn-hidden-size or the tensor-parallel size"),
        "the number of tokens of a micro-batch": (
            batch.micro_batch_size * batch.seq_length,
            "--micro-batch-size or --seq-length",
        ),
    }
    for name, (size, flags) in sizes.items():
        if size % ALIGNMENT:
            yield ConfigError(
                f"fp8 products need sizes that are multiples of {ALIGNMENT}, and {name} is {size} (--fp8-format)",
                fix=f"Change {flags}, or remove --fp8-format",
            )


RESOLVERS = (note_scaling,)
RULES = (fp8_fits,)
