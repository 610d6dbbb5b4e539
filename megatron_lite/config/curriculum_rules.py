"""Validation of --seq-length-warmup: order and lengths of the curriculum's stages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_lite.config.batch import SequenceRamp
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig


def sequence_ramp_rises(config: RunConfig) -> Iterator[ConfigError]:
    """Require a curriculum that rises to --seq-length in steps of tokens."""
    ramp, longest = config.batch.sequence_ramp, config.batch.seq_length
    if ramp is None:
        return
    lengths = [length for _, length in ramp.stages] or [ramp.start, ramp.step]
    outside = [str(length) for length in lengths if not 1 <= length <= longest]
    if outside:
        yield ConfigError(
            "--seq-length-warmup: the sequence "
            f"length{'' if ramp.stages else ' or step'}{'s' if len(outside) > 1 else ''} "
            f"{', '.join(outside)} {'are' if len(outside) > 1 else 'is'} outside 1 to {longest} (--seq-length "
            f"{longest})",
            fix=f"Give --seq-length-warmup {'lengths' if ramp.stages else 'a start and step'} from 1 to {longest}",
        )
    elif not ramp.stages and ramp.iterations < 1:
        yield ConfigError(
            f"--seq-length-warmup rises from {ramp.start} to {longest} tokens over {ramp.iterations} iterations",
            fix=f"Give it 1 or more iterations, for example --seq-length-warmup {ramp.start}:1000:{ramp.step}",
        )
    else:
        yield from _lengths_can_be_split(ramp, longest, config.parallel)
    for (before, _), (first, _) in pairwise(ramp.stages):
        if first <= before:
            text = f"two stages start at iteration {first}" if first == before else f"stage {first} follows {before}"
            yield ConfigError(
                f"--seq-length-warmup: {text}",
                fix="List the stages FIRST:LENGTH by increasing first iteration, for example 0:64,1000:512",
            )


def _lengths_can_be_split(ramp: SequenceRamp, longest: int, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Require lengths that ranks can share; those of a linear curriculum are multiples of its step."""
    tp, cp, unit = parallel.tp, parallel.cp, parallel.sequence_unit
    first = max(ramp.step, ramp.start - ramp.start % ramp.step)
    lengths = [length for _, length in ramp.stages] or [first, first + ramp.step]
    origin = "" if ramp.stages else f" (from {ramp.start} in steps of {ramp.step})"
    axis = (
        f"--context-parallel-size {cp} cannot split into {2 * cp} equal chunks"
        if cp > 1
        else f"--sequence-parallel cannot split over {tp} tensor-parallel ranks (--tensor-model-parallel-size {tp})"
    )
    for odd in [length for length in lengths if length % unit and length <= longest][:1]:
        yield ConfigError(
            f"--seq-length-warmup gives sequence length {odd}{origin}, which {axis}",
            fix=f"Make {'each length' if ramp.stages else 'the step'} a multiple of {unit}, or omit "
            f"{'--context-parallel-size' if cp > 1 else '--sequence-parallel'}",
        )


RULES = (sequence_ramp_rises,)
