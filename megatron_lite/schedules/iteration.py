"""Iteration plan: batch, sequence length, learning rate and samples of one iteration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.run import RunConfig
from megatron_lite.schedules.batch_size import global_batch_size
from megatron_lite.schedules.learning_rate import learning_rate, weight_decay
from megatron_lite.schedules.length import is_skipped_iteration
from megatron_lite.schedules.microbatches import num_microbatches
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.sequence_length import sequence_length


@dataclass(frozen=True)
class IterationPlan:
    """Plan of one iteration for one data-parallel replica.

    Attributes:
        iteration: number of the iteration, from 1.
        first_sample: samples consumed before; the iteration has samples [first_sample, first_sample + global_batch).
        microbatches: number of micro-batches of this replica, possibly 0.
        skip: True if the samples are consumed without training (--skip-train-iteration-range).
    """

    iteration: int
    replica: int
    first_sample: int
    global_batch: int
    seq_length: int
    microbatches: int
    learning_rate: float
    weight_decay: float
    skip: bool

    @property
    def tokens(self) -> int:
        """Tokens of the iteration over all replicas."""
        return self.global_batch * self.seq_length


def plan_iteration(config: RunConfig, progress: Progress, *, replica: int = 0) -> IterationPlan:
    """Return the plan of the iteration that follows `progress`."""
    iteration = progress.iteration + 1
    batch = global_batch_size(config.batch, progress.consumed_train_samples, config.parallel.dp)
    return IterationPlan(
        iteration=iteration,
        replica=replica,
        first_sample=progress.consumed_train_samples,
        global_batch=batch,
        seq_length=sequence_length(config.batch, progress.iteration),
        microbatches=num_microbatches(batch, config.batch.micro_batch_size, config.parallel.dp, replica),
        learning_rate=learning_rate(config, progress),
        weight_decay=weight_decay(config, progress),
        skip=is_skipped_iteration(config.training, iteration),
    )
