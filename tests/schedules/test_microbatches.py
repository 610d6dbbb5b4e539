from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.schedules.microbatches import idle_share, microbatch_number, microbatch_start, num_microbatches


@given(total=st.integers(0, 200), micro_batch=st.integers(1, 8), dp=st.integers(1, 70), consumed=st.integers(0, 10**9))
def test_each_sample_is_assigned_once(total, micro_batch, dp, consumed):
    samples: list[int] = []
    counts = [num_microbatches(total * micro_batch, micro_batch, dp, replica) for replica in range(dp)]
    for replica, count in enumerate(counts):
        for index in range(count):
            start = microbatch_start(consumed, micro_batch, dp, replica, index)
            assert start == consumed + microbatch_number(dp, replica, index) * micro_batch
            samples.extend(range(start, start + micro_batch))
    assert sorted(samples) == list(range(consumed, consumed + total * micro_batch))
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_order_is_megatrons_where_the_batch_divides():
    # Its sampler walks micro_batch * dp samples at a time and replica r takes the r-th slice of each.
    micro_batch, dp, consumed = 2, 4, 100
    for index in range(3):
        for replica in range(dp):
            assert microbatch_start(consumed, micro_batch, dp, replica, index) == (
                consumed + index * micro_batch * dp + replica * micro_batch
            )


def test_idle_share():
    assert idle_share(16, 1, 64) == 0.75
    assert idle_share(1024, 1, 64) == 0.0
    assert idle_share(48, 8, 4) == 0.25
