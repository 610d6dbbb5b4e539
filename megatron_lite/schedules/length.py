"""Run length: conversion between iterations, consumed samples and tokens.

Each stage of constant batch size has a closed form, so the cost does not grow with the iteration number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size, next_change
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.sequence_length import sequence_stages

START = Progress()
"""Progress of a new run."""


@dataclass(frozen=True)
class RampStage:
    """Iterations first_iteration … last_iteration (numbered from 1, as in the log) with one global batch size."""

    first_iteration: int
    last_iteration: int
    consumed: int
    """Samples consumed before first_iteration."""
    global_batch: int


@dataclass(frozen=True)
class EqualIterations:
    """`count` iterations (None: unlimited) with one batch size and sequence length, after `iteration` iterations."""

    iteration: int
    count: int | None
    global_batch: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Tokens of one of the iterations."""
        return self.global_batch * self.seq_length


@dataclass(frozen=True)
class _Stretch:
    """`count` iterations (None: unlimited) of `batch` samples, after `iteration` iterations and `consumed` samples."""

    iteration: int
    consumed: int
    batch: int
    count: int | None


def train_iterations(config: RunConfig, progress: Progress = START) -> int:
    """Return the iterations of the run: --train-iters, or the number of whole global batches in --train-samples.

    Args:
        config: configuration of the run.
        progress: progress at the resume; an earlier change of batch size changes the number of iterations.
    """
    if config.training.train_iters:
        return config.training.train_iters
    return iteration_at(config, config.training.train_samples, progress)


def train_samples(config: RunConfig, progress: Progress = START) -> int:
    """Return the number of training samples to request: those consumed at `progress` and all remaining ones.

    The result does not depend on the layout, and therefore neither does the order of the data.
    """
    consumed = progress.consumed_train_samples
    if config.training.train_samples:
        return max(consumed, config.training.train_samples)
    if progress.iteration >= config.training.train_iters:
        return consumed
    as_scheduled = replace(config.batch, decrease_if_needed=False)
    return _consumed_at(as_scheduled, config.training.train_iters, config.parallel.dp, progress)


def train_requests(config: RunConfig, progress: Progress = START) -> tuple[int, ...]:
    """Return the numbers of training samples to request one after the other, increasing.

    With --epochs, each epoch is requested on its own, so that it reads every document once.
    """
    one = config.epoch_samples
    if not one or config.data.sampler == "cyclic":  # the cyclic sampler begins a new pass at the end of the data
        return (one or train_samples(config, progress),)
    return tuple(one * number for number in range(1, config.tuning.epochs + 1))


def valid_samples(config: RunConfig, progress: Progress = START) -> int:
    """Return the number of validation samples to request: those consumed at `progress` and those of later validations.

    Validations run every eval_interval iterations, once after the run, and first if the last job left one unfinished.
    """
    training = config.training
    if not training.eval_iters:
        return 0
    every, end = training.eval_interval, max(progress.iteration, train_iterations(config, progress))
    validations = (end // every - progress.iteration // every if every else 0) + progress.validation_due + 1
    samples = validations * training.eval_iters * final_batch_size(config.batch, config.parallel.dp)
    return progress.consumed_valid_samples + samples


def test_samples(config: RunConfig) -> int:
    """Return the number of test samples to request: one evaluation after the run."""
    return config.training.eval_iters * final_batch_size(config.batch, config.parallel.dp)


def consumed_at(config: RunConfig, iteration: int, progress: Progress = START) -> int:
    """Return the samples consumed after `iteration` iterations, where `iteration` >= progress.iteration."""
    return _consumed_at(config.batch, iteration, config.parallel.dp, progress)


def iteration_at(config: RunConfig, consumed: int, progress: Progress = START) -> int:
    """Return the largest number of iterations n with consumed_at(n) <= consumed."""
    finished = progress.iteration
    for run in _stretches(config.batch, config.parallel.dp, progress):
        if run.consumed > consumed:
            break
        finished = run.iteration + (consumed - run.consumed) // run.batch
    return finished


def tokens_at(config: RunConfig, iteration: int) -> int:
    """Return the tokens consumed after `iteration` iterations; a sequence-length curriculum reduces them."""
    tokens = 0
    for run in equal_iterations(config):
        if run.count is None or iteration <= run.iteration + run.count:
            return tokens + (iteration - run.iteration) * run.tokens
        tokens += run.count * run.tokens
    raise AssertionError("the last stretch of equal iterations is unlimited")


def last_iteration(config: RunConfig) -> int:
    """Return the last iteration of the run: train_iterations, or the iteration that reaches --train-tokens."""
    last, missing = train_iterations(config), config.training.train_tokens
    if not missing:
        return last
    for run in equal_iterations(config):
        if run.count is None or missing <= run.count * run.tokens:
            return min(last, run.iteration - -missing // run.tokens)
        missing -= run.count * run.tokens
    raise AssertionError("the last stretch of equal iterations is unlimited")


def is_finished(config: RunConfig, progress: Progress) -> bool:
    """Return whether the run has reached its length; early exits are handled in lifecycle/stopping.py.

    --train-samples is compared in samples, so a run whose batch size changed still ends at its last sample.
    """
    training = config.training
    if training.train_tokens and progress.consumed_train_tokens >= training.train_tokens:
        return True
    if training.train_iters:
        return progress.iteration >= training.train_iters
    consumed = progress.consumed_train_samples
    return consumed + global_batch_size(config.batch, consumed, config.parallel.dp) > training.train_samples


def is_skipped_iteration(training: TrainingConfig, iteration: int) -> bool:
    """Return whether iteration `iteration` (from 1, as logged) consumes its samples without training."""
    return any(first <= iteration <= last for first, last in training.skip_iteration_ranges)


def skipped_samples(config: RunConfig, iteration: int) -> int:
    """Return the samples consumed without training in the first `iteration` iterations; ranges may overlap."""
    skipped, done = 0, 0
    for first, last in sorted(config.training.skip_iteration_ranges):
        begin, end = max(first - 1, done), min(last, iteration)
        if begin < end:
            skipped += consumed_at(config, end) - consumed_at(config, begin)
            done = end
    return skipped


def ramp_stages(config: RunConfig) -> list[RampStage]:
    """Return the stages of constant global batch size from iteration 1 to the last; empty for 0 iterations."""
    last, stages = train_iterations(config), list[RampStage]()
    for run in _stretches(config.batch, config.parallel.dp):
        if run.iteration >= last:
            break
        end = last if run.count is None else min(last, run.iteration + run.count)
        if stages and stages[-1].global_batch == run.batch:
            stages[-1] = replace(stages[-1], last_iteration=end)
        else:
            stages.append(RampStage(run.iteration + 1, end, run.consumed, run.batch))
    return stages


def equal_iterations(config: RunConfig) -> Iterator[EqualIterations]:
    """Yield the stretches of equal batch size and sequence length; the last is unlimited."""
    runs, stages = _stretches(config.batch, config.parallel.dp), sequence_stages(config.batch)
    run, (_, length), following = next(runs), next(stages), next(stages, None)
    start = 0
    while run.count is not None or following is not None:
        run_end = math.inf if run.count is None else run.iteration + run.count
        stage_end = math.inf if following is None else following[0]
        end = int(min(run_end, stage_end))
        if end > start:
            yield EqualIterations(start, end - start, run.batch, length)
        start = end
        if run_end == end:
            run = next(runs)
        if following is not None and stage_end == end:
            length, following = following[1], next(stages, None)
    yield EqualIterations(start, None, run.batch, length)


def _consumed_at(batch: BatchConfig, iteration: int, dp: int, progress: Progress) -> int:
    for run in _stretches(batch, dp, progress):
        if run.count is None or iteration <= run.iteration + run.count:
            return run.consumed + (iteration - run.iteration) * run.batch
    raise AssertionError("the last stretch of equal batches is unlimited")


def _stretches(batch: BatchConfig, dp: int, progress: Progress = START) -> Iterator[_Stretch]:
    """Yield the stretches of equal batch size from `progress` on; the last is unlimited."""
    iteration, consumed = progress.iteration, progress.consumed_train_samples
    while True:
        size, border = global_batch_size(batch, consumed, dp), next_change(batch, consumed, dp)
        if border is None:
            yield _Stretch(iteration, consumed, size, None)
            return
        count = -((consumed - border) // size)  # rounded up: the iteration that crosses the threshold has this size
        yield _Stretch(iteration, consumed, size, count)
        iteration, consumed = iteration + count, consumed + count * size
