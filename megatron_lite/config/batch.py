"""Batch config: sequence length, micro-batch and global batch size, batch ramp-up, sequence-length curriculum."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rampup:
    """--rampup-batch-size: from `start` in steps of `increment` over the first `samples` samples."""

    start: int
    increment: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class SequenceRamp:
    """Curriculum by sequence length (Li et al. 2021, arXiv:2108.06084), as DeepSpeed's JSON spells it.

    fixed_linear: from `start` to seq_length over `iterations`, rounded down to a multiple of `step`.
    staged: `stages` holds (first iteration, length) pairs; the other fields are unused.
    """

    start: int = 0
    iterations: int = 0
    step: int = 8
    stages: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes in samples (one sample is one sequence of `seq_length` tokens)."""

    seq_length: int
    micro_batch_size: int
    global_batch_size: int = 0
    """Samples of one iteration once any ramp-up is over; 0: micro_batch_size * dp."""
    rampup: Rampup | None = None
    step_schedule: tuple[tuple[int, int], ...] = ()
    """--step-batch-size-schedule as (consumed samples from which it holds, global batch) pairs, sorted."""
    decrease_if_needed: bool = False
    """--decrease-batch-size-if-needed: round a batch down to a multiple of micro_batch_size * dp."""
    sequence_ramp: SequenceRamp | None = None
