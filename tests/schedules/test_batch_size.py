from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.batch import BatchConfig, Rampup
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size, next_change

TR1 = BatchConfig(
    seq_length=2048,
    micro_batch_size=1,
    global_batch_size=1024,
    rampup=Rampup(start=16, increment=16, samples=5_000_000),
)


def test_default_batch_is_one_micro_batch_per_replica():
    batch = BatchConfig(seq_length=8, micro_batch_size=4)
    assert global_batch_size(batch, 1000, dp=3) == final_batch_size(batch, dp=3) == 12
    assert next_change(batch, 0, dp=3) is None


def test_thresholds_of_the_tr1_ramp():
    # 63 increments over 5 million samples: one every 79365.08.
    sizes = [global_batch_size(TR1, consumed) for consumed in (0, 79_365, 79_366, 4_999_999, 5_000_001, 300_000_000)]
    assert sizes == [16, 16, 32, 1008, 1024, 1024]
    assert next_change(TR1, 0) == 79_366
    assert next_change(TR1, 5_000_001) is None


@pytest.mark.parametrize(
    "ramp", [Rampup(start=64, increment=16, samples=100), Rampup(start=16, increment=16, samples=0)]
)
def test_a_ramp_without_steps_is_a_constant_batch(ramp):
    batch = BatchConfig(seq_length=8, micro_batch_size=1, global_batch_size=64, rampup=ramp)
    assert {global_batch_size(batch, consumed) for consumed in (0, 1, 99, 100, 101)} == {64}


def test_step_schedule_takes_the_last_threshold_reached():
    batch = BatchConfig(seq_length=8, micro_batch_size=1, step_schedule=((0, 16), (100, 320), (200, 64)))
    assert [global_batch_size(batch, consumed) for consumed in (0, 99, 100, 199, 200, 10**9)] == [
        16,
        16,
        320,
        320,
        64,
        64,
    ]
    assert [next_change(batch, consumed) for consumed in (0, 99, 100, 200)] == [100, 100, 200, None]
    assert final_batch_size(batch) == 64


def test_decrease_to_whole_rounds_of_micro_batches():
    batch = BatchConfig(
        seq_length=8,
        micro_batch_size=2,
        global_batch_size=20,
        rampup=Rampup(start=4, increment=4, samples=40),
        decrease_if_needed=True,
    )
    assert [global_batch_size(batch, consumed, dp=3) for consumed in (0, 10, 20, 30, 41)] == [4, 6, 12, 12, 18]
    assert global_batch_size(batch, 41, dp=1) == 20


@given(
    start=st.integers(1, 40),
    increment=st.integers(1, 9),
    steps=st.integers(0, 30),
    samples=st.integers(0, 5000),
    consumed=st.integers(0, 6000),
)
def test_a_ramp_is_monotonic_and_changes_at_next_change(start, increment, steps, samples, consumed):
    final = start + increment * steps
    batch = BatchConfig(
        seq_length=8,
        micro_batch_size=1,
        global_batch_size=final,
        rampup=Rampup(start=start, increment=increment, samples=samples),
    )
    size, border = global_batch_size(batch, consumed), next_change(batch, consumed)
    assert start <= size <= final
    assert size <= global_batch_size(batch, consumed + 1)
    if border is None:
        assert size == final
    else:
        assert border > consumed
        assert global_batch_size(batch, border - 1) == size
        assert global_batch_size(batch, border) > size or size == final
