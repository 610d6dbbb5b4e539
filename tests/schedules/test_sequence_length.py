from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.batch import BatchConfig, SequenceRamp
from megatron_lite.schedules.sequence_length import sequence_length, sequence_stages


def batch(seq_length=2048, **ramp):
    return BatchConfig(seq_length=seq_length, micro_batch_size=1, sequence_ramp=SequenceRamp(**ramp))


def test_without_a_curriculum_every_iteration_is_full_length():
    plain = BatchConfig(seq_length=2048, micro_batch_size=1)
    assert sequence_length(plain, 0) == sequence_length(plain, 10**6) == 2048
    assert list(sequence_stages(plain)) == [(0, 2048)]


def test_linear_curriculum_of_the_104b_run():
    run = batch(start=64, iterations=36_000, step=8)
    # Number n is floor(n / 36000 * 1984 + 64), rounded down to a multiple of 8.
    assert [sequence_length(run, number - 1) for number in (1, 145, 146, 18_000, 35_999, 36_000, 99_999)] == [
        64,
        64,
        72,
        1056,
        2040,
        2048,
        2048,
    ]


def test_stages_are_named_by_iteration_number():
    run = batch(stages=((1, 128), (100, 512), (200, 4096)))
    assert [sequence_length(run, number - 1) for number in (1, 99, 100, 199, 200)] == [128, 128, 512, 512, 2048]
    assert list(sequence_stages(run)) == [(0, 128), (99, 512), (199, 2048)]


def test_stages_of_a_steep_curriculum():
    """More lengths than iterations."""
    stages = list(sequence_stages(batch(seq_length=10**9, start=64, iterations=50, step=1)))
    assert [start for start, _ in stages] == list(range(50))
    assert stages[-1] == (49, 10**9)


def test_a_length_is_never_zero():
    assert sequence_length(batch(start=2, iterations=10_000, step=16), 0) == 16


@given(
    start=st.integers(1, 80),
    extra=st.integers(0, 90),
    iterations=st.integers(0, 300),
    step=st.sampled_from([1, 3, 8, 16]),
)
def test_stages_equal_the_length_of_each_iteration(start, extra, iterations, step):
    run = batch(seq_length=start + extra + 16, start=start, iterations=iterations, step=step)
    asked = [sequence_length(run, iteration) for iteration in range(iterations + 5)]
    stages = list(sequence_stages(run))
    changes = [i for i in range(len(asked)) if i == 0 or asked[i] != asked[i - 1]]
    assert stages == [(iteration, asked[iteration]) for iteration in changes]
    assert asked == sorted(asked)
    assert asked[0] > 0
    assert asked[-1] == run.seq_length
