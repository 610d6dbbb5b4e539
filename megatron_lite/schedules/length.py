"""Run length: conversion between iterations, consumed samples and tokens.

Everything is a closed form per stage of constant batch, so iteration 300,000 costs no more than iteration 3.
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
"""Progress of a run that has not begun."""


@dataclass(frozen=True)
class RampStage:
    """Iterations first_iteration … last_iteration (numbered from 1, as the log does) of one global batch."""

    first_iteration: int
    last_iteration: int
    consumed: int
    """Samples consumed before first_iteration."""
    global_batch: int


@dataclass(frozen=True)
class _Run:
    """From `iteration` finished iterations and `consumed` samples on, `count` iterations of `batch` (None: all)."""

    iteration: int
    consumed: int
    batch: int
    count: int | None


def train_iterations(config: RunConfig, progress: Progress = START) -> int:
    """Iterations of the run: --train-iters, or as many whole global batches as fit into --train-samples.

    Args:
        config: the run.
        progress: where it is resumed; a run whose batch was changed before has other iterations than its flags say.
    """
    if config.training.train_iters:
        return config.training.train_iters
    return iteration_at(config, config.training.train_samples, progress)


def train_samples(config: RunConfig, progress: Progress = START) -> int:
    """Samples that the training data must hold: those consumed at `progress` and all that remain from there.

    Independent of the layout, so that the order of the data is, too.
    """
    consumed = progress.consumed_train_samples
    if config.training.train_samples:
        return max(consumed, config.training.train_samples)
    if progress.iteration >= config.training.train_iters:
        return consumed
    as_scheduled = replace(config.batch, decrease_if_needed=False)
    return _consumed_at(as_scheduled, config.training.train_iters, config.parallel.dp, progress)


def valid_samples(config: RunConfig, progress: Progress = START) -> int:
    """Samples that the validation data must hold: those consumed at `progress` and those of all later validations.

    There is one validation every eval_interval, one after the run, and first the one that the last job did not finish.
    """
    training = config.training
    if not training.eval_iters:
        return 0
    every, end = training.eval_interval, max(progress.iteration, train_iterations(config, progress))
    validations = (end // every - progress.iteration // every if every else 0) + progress.validation_due + 1
    samples = validations * training.eval_iters * final_batch_size(config.batch, config.parallel.dp)
    return progress.consumed_valid_samples + samples


def test_samples(config: RunConfig) -> int:
    """Samples the test data is asked for: one evaluation after the run."""
    return config.training.eval_iters * final_batch_size(config.batch, config.parallel.dp)


def consumed_at(config: RunConfig, iteration: int, progress: Progress = START) -> int:
    """Samples consumed when `iteration` iterations are finished, `iteration` being no earlier than `progress`."""
    return _consumed_at(config.batch, iteration, config.parallel.dp, progress)


def iteration_at(config: RunConfig, consumed: int, progress: Progress = START) -> int:
    """Finished iterations that `consumed` samples suffice for: the largest n with consumed_at(n) <= consumed."""
    finished = progress.iteration
    for run in _runs(config.batch, config.parallel.dp, progress):
        if run.consumed > consumed:
            break
        finished = run.iteration + (consumed - run.consumed) // run.batch
    return finished


def tokens_at(config: RunConfig, iteration: int) -> int:
    """Tokens consumed when `iteration` iterations are finished; a curriculum makes them fewer than samples * length."""
    tokens = 0
    for start, count, per_iteration in _token_runs(config):
        if count is None or iteration <= start + count:
            return tokens + (iteration - start) * per_iteration
        tokens += count * per_iteration
    raise AssertionError("the last run of equal iterations has no end")


def last_iteration(config: RunConfig) -> int:
    """Iteration after which the run ends: train_iterations, or earlier where --train-tokens is reached first."""
    last, missing = train_iterations(config), config.training.train_tokens
    if not missing:
        return last
    for start, count, per_iteration in _token_runs(config):
        if count is None or missing <= count * per_iteration:
            return min(last, start - -missing // per_iteration)
        missing -= count * per_iteration
    raise AssertionError("the last run of equal iterations has no end")


def is_finished(config: RunConfig, progress: Progress) -> bool:
    """Whether the run has reached its length (early exits are train/'s business).

    Samples are compared as samples: a run whose batch was changed on the way still ends where its data does.
    """
    training = config.training
    if training.train_tokens and progress.consumed_train_tokens >= training.train_tokens:
        return True
    if training.train_iters:
        return progress.iteration >= training.train_iters
    consumed = progress.consumed_train_samples
    return consumed + global_batch_size(config.batch, consumed, config.parallel.dp) > training.train_samples


def is_skipped_iteration(training: TrainingConfig, iteration: int) -> bool:
    """Whether iteration number `iteration` (from 1, as logged) only consumes its samples and trains on none."""
    return any(first <= iteration <= last for first, last in training.skip_iteration_ranges)


def skipped_samples(config: RunConfig, iteration: int) -> int:
    """Samples consumed without training in the first `iteration` iterations; ranges may overlap."""
    skipped, done = 0, 0
    for first, last in sorted(config.training.skip_iteration_ranges):
        begin, end = max(first - 1, done), min(last, iteration)
        if begin < end:
            skipped += consumed_at(config, end) - consumed_at(config, begin)
            done = end
    return skipped


def ramp_stages(config: RunConfig) -> list[RampStage]:
    """Stages of constant global batch, in order, from iteration 1 to the last; empty for a run of no iterations."""
    last, stages = train_iterations(config), list[RampStage]()
    for run in _runs(config.batch, config.parallel.dp):
        if run.iteration >= last:
            break
        end = last if run.count is None else min(last, run.iteration + run.count)
        if stages and stages[-1].global_batch == run.batch:
            stages[-1] = replace(stages[-1], last_iteration=end)
        else:
            stages.append(RampStage(run.iteration + 1, end, run.consumed, run.batch))
    return stages


def _consumed_at(batch: BatchConfig, iteration: int, dp: int, progress: Progress) -> int:
    for run in _runs(batch, dp, progress):
        if run.count is None or iteration <= run.iteration + run.count:
            return run.consumed + (iteration - run.iteration) * run.batch
    raise AssertionError("the last run of equal batches has no end")


def _runs(batch: BatchConfig, dp: int, progress: Progress = START) -> Iterator[_Run]:
    """Yield runs of iterations with the same batch, from `progress` on; the last has no end."""
    iteration, consumed = progress.iteration, progress.consumed_train_samples
    while True:
        size, border = global_batch_size(batch, consumed, dp), next_change(batch, consumed, dp)
        if border is None:
            yield _Run(iteration, consumed, size, None)
            return
        count = -((consumed - border) // size)  # rounded up: the iteration that crosses the border still has this size
        yield _Run(iteration, consumed, size, count)
        iteration, consumed = iteration + count, consumed + count * size


def _token_runs(config: RunConfig) -> Iterator[tuple[int, int | None, int]]:
    """Yield (finished iterations at its start, iterations, tokens of one) where batch and length are the same."""
    runs, stages = _runs(config.batch, config.parallel.dp), sequence_stages(config.batch)
    run, (_, length), following = next(runs), next(stages), next(stages, None)
    start = 0
    while run.count is not None or following is not None:
        run_end = math.inf if run.count is None else run.iteration + run.count
        stage_end = math.inf if following is None else following[0]
        end = int(min(run_end, stage_end))
        if end > start:
            yield start, end - start, run.batch * length
        start = end
        if run_end == end:
            run = next(runs)
        if following is not None and stage_end == end:
            length, following = following[1], next(stages, None)
    yield start, None, run.batch * length
