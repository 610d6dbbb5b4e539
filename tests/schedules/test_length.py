from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.batch import Rampup, SequenceRamp
from megatron_lite.schedules import length
from megatron_lite.schedules.batch_size import global_batch_size
from megatron_lite.schedules.length import (
    consumed_at,
    is_finished,
    is_skipped_iteration,
    iteration_at,
    last_iteration,
    ramp_stages,
    tokens_at,
    train_iterations,
    train_samples,
    valid_samples,
)
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.sequence_length import sequence_length


def ramp(start, increment, samples):
    return Rampup(start=start, increment=increment, samples=samples)


@pytest.mark.parametrize(
    ("rampup", "global_batch", "samples", "iterations"),
    [
        (ramp(16, 16, 5_000_000), 1024, 300_000_000, 311_541),  # BigScience tr1, 13B
        (ramp(16, 16, 6_000_000), 2048, 300_000_000, 159_576),  # tr8, 104B
        (ramp(192, 16, 9_765_625), 2048, 220_000_000, 115_311),  # tr11, 176B
        (None, 512, 1_000_000, 1953),
    ],
)
def test_iterations_of_known_runs(run_config, rampup, global_batch, samples, iterations):
    config = run_config(rampup=rampup, global_batch_size=global_batch, train_samples=samples)
    assert train_iterations(config) == iterations
    assert train_samples(config) == samples
    assert 0 <= samples - consumed_at(config, iterations) < global_batch


def test_counts_of_the_validation_and_test_data(run_config):
    config = run_config(
        rampup=ramp(16, 16, 5_000_000),
        global_batch_size=1024,
        train_samples=300_000_000,
        eval_iters=5,
        micro_batch_size=1,
    )
    assert valid_samples(config) == (311_541 // 1000 + 1) * 5 * 1024
    assert valid_samples(run_config(global_batch_size=1024, train_iters=10, eval_interval=0, eval_iters=5)) == 5 * 1024
    assert length.test_samples(config) == 5 * 1024


def test_ramp_up_together_with_train_iters(run_config):
    config = run_config(rampup=ramp(2, 2, 12), global_batch_size=8, train_iters=6)
    # One increment every 4 samples.
    assert [consumed_at(config, iteration) for iteration in range(7)] == [0, 2, 4, 8, 14, 22, 30]
    assert train_samples(config) == 30


def test_requests_do_not_depend_on_the_layout(run_config):
    fields = {"global_batch_size": 20, "train_iters": 10, "micro_batch_size": 2, "decrease_if_needed": True}
    narrow, wide = run_config(dp=1, **fields), run_config(dp=4, **fields)
    assert consumed_at(narrow, 10) == 200
    assert consumed_at(wide, 10) == 160
    assert train_samples(narrow) == train_samples(wide) == 200


def test_a_ramp_longer_than_the_run(run_config):
    config = run_config(rampup=ramp(10, 10, 10_000), global_batch_size=100, train_samples=105)
    assert train_iterations(config) == 10
    (stage,) = ramp_stages(config)
    assert (stage.first_iteration, stage.last_iteration, stage.consumed, stage.global_batch) == (1, 10, 0, 10)


def test_stages_of_tr1(run_config):
    config = run_config(rampup=ramp(16, 16, 5_000_000), global_batch_size=1024, train_samples=300_000_000)
    stages = ramp_stages(config)
    assert [stage.global_batch for stage in stages] == list(range(16, 1025, 16))
    assert stages[0].last_iteration == 4961
    assert stages[-1].last_iteration == 311_541
    for before, after in pairwise(stages):
        assert after.first_iteration == before.last_iteration + 1
        assert after.consumed == consumed_at(config, before.last_iteration)


def test_tokens_limit_ends_a_run_early(run_config):
    config = run_config(global_batch_size=4, train_iters=100, train_tokens=1000)
    assert last_iteration(config) == 8  # 128 tokens an iteration
    assert not is_finished(config, Progress(iteration=7, consumed_train_samples=28, consumed_train_tokens=896))
    assert is_finished(config, Progress(iteration=8, consumed_train_samples=32, consumed_train_tokens=1024))
    assert last_iteration(run_config(global_batch_size=4, train_iters=5, train_tokens=1000)) == 5


def test_a_run_with_changed_batch_ends_with_its_samples(run_config):
    config = run_config(global_batch_size=10, train_samples=100)
    assert not is_finished(config, Progress(iteration=500, consumed_train_samples=90))
    assert is_finished(config, Progress(iteration=2, consumed_train_samples=91))


def test_skipped_ranges_are_inclusive(run_config):
    training = run_config(train_iters=100, skip_iteration_ranges=((2, 5), (10, 10))).training
    assert [i for i in range(1, 20) if is_skipped_iteration(training, i)] == [2, 3, 4, 5, 10]


@st.composite
def schedules(draw):
    """Strategy for valid batch fields of a small run, with micro-batches of 1."""
    fields = {"dp": draw(st.integers(1, 6)), "decrease_if_needed": draw(st.booleans())}
    kind = draw(st.sampled_from(["constant", "ramp", "steps", "derived"]))
    if kind == "steps":
        thresholds = sorted(draw(st.sets(st.integers(1, 900), max_size=4)))
        fields["step_schedule"] = tuple((at, draw(st.integers(1, 60))) for at in (0, *thresholds))
    elif kind != "derived":
        start, increment = draw(st.integers(1, 30)), draw(st.integers(1, 12))
        fields["global_batch_size"] = start + increment * draw(st.integers(0, 12))
        if kind == "ramp":
            fields["rampup"] = ramp(start, increment, draw(st.integers(0, 900)))
    if draw(st.booleans()):
        fields["sequence_ramp"] = SequenceRamp(
            start=draw(st.integers(1, 32)), iterations=draw(st.integers(0, 60)), step=4
        )
    return fields


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(fields=schedules(), samples=st.integers(0, 1500))
def test_samples_iterations_and_batches_agree_with_the_plain_loop(run_config, fields, samples):
    config = run_config(train_samples=samples, **fields)
    dp, progress = config.parallel.dp, Progress()
    batches: list[int] = []
    while not is_finished(config, progress):
        size = global_batch_size(config.batch, progress.consumed_train_samples, dp)
        assert size > 0
        assert consumed_at(config, progress.iteration) == progress.consumed_train_samples
        assert tokens_at(config, progress.iteration) == progress.consumed_train_tokens
        for consumed in (progress.consumed_train_samples, progress.consumed_train_samples + size - 1):
            assert iteration_at(config, consumed) == progress.iteration
        tokens = size * sequence_length(config.batch, progress.iteration)
        progress = progress.advance(size, tokens, applied=True)
        batches.append(size)
    assert train_iterations(config) == last_iteration(config) == len(batches)
    for limit in {1, progress.consumed_train_tokens // 2, progress.consumed_train_tokens} - {0}:
        limited = replace(config, training=replace(config.training, train_tokens=limit))
        ends = [n for n in range(len(batches) + 1) if tokens_at(config, n) >= limit]
        assert last_iteration(limited) == min(ends, default=len(batches))
    assert consumed_at(config, len(batches)) == sum(batches) <= samples
    staged = [s.global_batch for s in ramp_stages(config) for _ in range(s.first_iteration, s.last_iteration + 1)]
    assert staged == batches
    assert all(a.global_batch != b.global_batch for a, b in pairwise(ramp_stages(config)))
