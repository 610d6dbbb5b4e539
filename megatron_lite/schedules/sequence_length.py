"""Sequence-length curriculum (Li et al. 2021, arXiv:2108.06084): sequence length by iteration.

A shorter sequence is a prefix of the sample: the curriculum changes the number of tokens, and the samples stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_lite.config.batch import BatchConfig, SequenceRamp


def sequence_length(batch: BatchConfig, iteration: int) -> int:
    """Return the sequence length of the iteration that follows `iteration` finished iterations.

    Stages start at iteration numbers as in the log, from 1; the first stage also covers earlier iterations.
    """
    ramp = batch.sequence_ramp
    if ramp is None:
        return batch.seq_length
    number = iteration + 1
    if ramp.stages:
        length = ramp.stages[0][1]
        for first, of_stage in ramp.stages:
            if number >= first:
                length = of_stage
        return min(length, batch.seq_length)
    return _linear(ramp, batch.seq_length, number)


def sequence_stages(batch: BatchConfig) -> Iterator[tuple[int, int]]:
    """Yield (finished iterations, sequence length from there on) for iteration 0 and every change of length."""
    start, length = 0, sequence_length(batch, 0)
    yield start, length
    for candidate in _changes(batch):
        if candidate > start and sequence_length(batch, candidate) != length:
            start, length = candidate, sequence_length(batch, candidate)
            yield start, length


def _linear(ramp: SequenceRamp, longest: int, number: int) -> int:
    """Return the length of DeepSpeed's fixed_linear schedule, at least one step."""
    if number >= ramp.iterations:
        return longest
    length = math.floor(number / ramp.iterations * (longest - ramp.start) + ramp.start)
    return min(longest, max(ramp.step, length - length % ramp.step))


def _changes(batch: BatchConfig) -> Iterator[int]:
    """Yield the finished iterations at which the length may change, ascending."""
    ramp = batch.sequence_ramp
    if ramp is None:
        return
    if ramp.stages:
        yield from (first - 1 for first, _ in ramp.stages)
        return
    slope = (batch.seq_length - ramp.start) / max(1, ramp.iterations)
    if slope > ramp.step:
        # The length changes in nearly every iteration, and there are fewer iterations than lengths.
        yield from range(1, ramp.iterations - 1)
    elif slope > 0:
        for length in range(ramp.start // ramp.step * ramp.step + ramp.step, batch.seq_length, ramp.step):
            # One iteration to either side: the exact iteration depends on floating-point rounding.
            guess = math.ceil((length - ramp.start) / slope) - 1
            yield from (max(0, guess - 1), max(0, guess), guess + 1)
    yield max(0, ramp.iterations - 1)
