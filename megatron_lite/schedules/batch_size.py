"""Global batch size as a function of consumed samples: constant, ramp-up or step table."""

from __future__ import annotations

import math

from megatron_lite.config.batch import BatchConfig, Rampup


def final_batch_size(batch: BatchConfig, dp: int = 1) -> int:
    """Return the global batch size after every ramp-up, before --decrease-batch-size-if-needed."""
    if batch.step_schedule:
        return batch.step_schedule[-1][1]
    return batch.global_batch_size or batch.micro_batch_size * dp


def global_batch_size(batch: BatchConfig, consumed: int, dp: int = 1) -> int:
    """Return the global batch size of the iteration that starts after `consumed` samples.

    Args:
        batch: sizes and schedules.
        consumed: samples consumed before this iteration.
        dp: data-parallel size; used by --decrease-batch-size-if-needed and by the default of --global-batch-size.
    """
    if batch.step_schedule:
        size = batch.step_schedule[0][1]
        for threshold, at_threshold in batch.step_schedule:
            if consumed >= threshold:
                size = at_threshold
    elif batch.rampup is not None:
        size = _ramped(batch.rampup, final_batch_size(batch, dp), consumed)
    else:
        size = final_batch_size(batch, dp)
    if batch.decrease_if_needed:
        # Megatron rounds a batch smaller than one micro-batch on every replica down to zero and fails. Replicas may be
        # idle here, so such a batch is kept.
        one_each = batch.micro_batch_size * dp
        size = size // one_each * one_each or size
    return size


def next_change(batch: BatchConfig, consumed: int, dp: int = 1) -> int | None:
    """Return the smallest sample count above `consumed` at which the batch size changes; None: it is final."""
    if batch.step_schedule:
        return min((threshold for threshold, _ in batch.step_schedule if threshold > consumed), default=None)
    ramp = batch.rampup
    if ramp is None or consumed > ramp.samples:
        return None
    steps = _increments(ramp, final_batch_size(batch, dp))
    if not steps or not ramp.samples:
        return ramp.samples + 1
    samples_per_step = ramp.samples / steps
    step = int(consumed / samples_per_step) + 1
    if step > steps:
        return ramp.samples + 1
    # The batch size follows from a floating-point division. The threshold is found by the same division, starting at a
    # product that is off by one at most.
    border = math.ceil(step * samples_per_step)
    while int(border / samples_per_step) >= step:
        border -= 1
    while int(border / samples_per_step) < step:
        border += 1
    return min(border, ramp.samples + 1)


def _ramped(ramp: Rampup, final: int, consumed: int) -> int:
    """Return the batch size of Megatron's ramp-up: `start`, plus one increment per samples / steps consumed samples."""
    steps = _increments(ramp, final)
    if consumed > ramp.samples or not steps or not ramp.samples:
        return final
    return min(final, ramp.start + int(consumed / (ramp.samples / steps)) * ramp.increment)


def _increments(ramp: Rampup, final: int) -> int:
    return (final - ramp.start) // ramp.increment if ramp.increment > 0 else 0
