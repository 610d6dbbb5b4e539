from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.batch import Rampup, SequenceRamp
from megatron_lite.schedules.learning_rate import learning_rate, weight_decay
from megatron_lite.schedules.length import consumed_at, tokens_at
from megatron_lite.schedules.progress import Progress


def after(config, iteration):
    """Return the progress of a run without skipped iterations."""
    samples, tokens = consumed_at(config, iteration), tokens_at(config, iteration)
    return Progress(
        iteration=iteration,
        consumed_train_samples=samples,
        consumed_train_tokens=tokens,
        applied_iterations=iteration,
        applied_samples=samples,
        applied_tokens=tokens,
    )


def rates(config, iterations):
    return [learning_rate(config, after(config, iteration)) for iteration in iterations]


def test_warm_up_starts_at_warmup_init_and_ends_at_the_full_rate(run_config):
    fields = {"global_batch_size": 4, "train_iters": 100, "lr": 1.0, "style": "constant", "warmup_iters": 10}
    assert rates(run_config(**fields), [0, 5, 10, 11, 100]) == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert rates(run_config(warmup_init=0.5, **fields), [0, 5, 10]) == [0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.1, 0.1]),
        ("cosine", [1.0, 0.1 + 0.45 * (math.sqrt(0.5) + 1), 0.55, 0.1, 0.1]),
        # Megatron's steps are samples: 20 iterations of 4.
        ("inverse-square-root", [1.0, math.sqrt(1 / 2), math.sqrt(1 / 3), math.sqrt(1 / 5), 0.1]),
    ],
)
def test_decay(run_config, style, expected):
    config = run_config(
        global_batch_size=4, train_iters=200, lr=1.0, min_lr=0.1, style=style, warmup_iters=20, decay_iters=100
    )
    assert rates(config, [20, 40, 60, 100, 101]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("style", "middle"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_warmup_stable_decay(run_config, style, middle):
    config = run_config(global_batch_size=4, train_iters=100, lr=1.0, style="WSD", wsd_style=style, wsd_decay_iters=20)
    assert rates(config, [0, 50, 80, 90, 100, 101]) == pytest.approx([1.0, 1.0, 1.0, middle, 0.0, 0.0])


def test_a_run_in_samples_decays_over_its_samples_by_default(run_config):
    config = run_config(global_batch_size=10, train_samples=1000, lr=1.0, style="linear", warmup_fraction=0.1)
    assert rates(config, [0, 5, 10, 55, 100]) == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    slower = run_config(global_batch_size=10, train_samples=1000, lr=1.0, style="linear", decay_samples=2000)
    assert rates(slower, [100]) == pytest.approx([0.5])


def test_ramp_up_in_samples_counts_samples(run_config):
    ramp = Rampup(start=2, increment=2, samples=40)
    config = run_config(
        global_batch_size=10, rampup=ramp, train_samples=1000, lr=1.0, style="linear", warmup_samples=12
    )
    # 10 samples a step: five iterations of 2, then one of 4 passes the warm-up's end.
    assert rates(config, [5, 6]) == pytest.approx([10 / 12, 1 - 2 / 988])


def test_ramp_up_in_iterations_ends_decay_at_the_given_iteration(run_config):
    ramp = Rampup(start=2, increment=2, samples=40)
    config = run_config(global_batch_size=10, rampup=ramp, train_iters=50, lr=1.0, style="linear", warmup_iters=10)
    assert rates(config, [5, 10, 30, 50, 51]) == pytest.approx([0.5, 1.0, 0.5, 0.0, 0.0])


def test_skipped_iterations_do_not_advance_the_rate(run_config):
    config = run_config(global_batch_size=4, train_iters=100, lr=1.0, style="constant", warmup_iters=10)
    progress = Progress().advance(4, 128, True).advance(4, 128, False).advance(4, 128, True)
    assert learning_rate(config, progress) == 0.2
    config = run_config(global_batch_size=4, train_samples=400, lr=1.0, style="constant", warmup_samples=40)
    assert learning_rate(config, progress) == 0.2


def test_decay_in_tokens_starts_where_the_warm_up_ends(run_config):
    config = run_config(
        global_batch_size=4,
        train_samples=4000,
        lr=1.0,
        style="linear",
        warmup_samples=40,
        decay_tokens=tokens_at(
            run_config(global_batch_size=4, sequence_ramp=SequenceRamp(start=8, iterations=30)), 100
        ),
        sequence_ramp=SequenceRamp(start=8, iterations=30, step=8),
    )
    assert rates(config, [10, 100, 101]) == pytest.approx([1.0, 0.0, 0.0])
    done = (tokens_at(config, 50) - tokens_at(config, 10)) / (tokens_at(config, 100) - tokens_at(config, 10))
    assert rates(config, [50]) == pytest.approx([1 - done])


def test_weight_decay_grows_over_the_run(run_config):
    assert weight_decay(run_config(weight_decay=0.3, train_iters=10), Progress()) == 0.3
    for style, quarter in (("linear", 0.125), ("cosine", 0.1 + 0.1 * 0.5 * (1 - math.sqrt(0.5)))):
        config = run_config(
            global_batch_size=4, train_iters=100, start_weight_decay=0.1, end_weight_decay=0.2, weight_decay_style=style
        )
        grown = [weight_decay(config, after(config, iteration)) for iteration in (0, 25, 100, 101)]
        assert grown == pytest.approx([0.1, quarter, 0.2, 0.2])


@given(
    unit=st.integers(1, 64),
    style=st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    warmup=st.integers(0, 20),
    more=st.integers(1, 30),
    iteration=st.integers(0, 60),
)
def test_a_constant_batch_gives_the_same_bits_in_iterations_and_in_samples(
    run_config, unit, style, warmup, more, iteration
):
    common = {"global_batch_size": unit, "lr": 3e-4, "min_lr": 1e-5, "style": style}
    decay, wsd = warmup + more, more // 2
    in_iterations = run_config(train_iters=60, warmup_iters=warmup, decay_iters=decay, wsd_decay_iters=wsd, **common)
    in_samples = run_config(
        train_samples=60 * unit,
        warmup_samples=warmup * unit,
        decay_samples=decay * unit,
        wsd_decay_samples=wsd * unit,
        **common,
    )
    rate = learning_rate(in_iterations, after(in_iterations, iteration))
    assert rate == learning_rate(in_samples, after(in_samples, iteration))
    assert 0 <= rate <= 3e-4 * (1 + 1e-12)  # as in Megatron, the end of a warm-up may be off by its last bit
