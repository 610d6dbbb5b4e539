"""Places of samples with excluded ranges."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.schedules.skipping import merged, place_of

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6)


@given(RANGES, st.integers(1, 80))
def test_places_are_the_not_excluded_ones_in_order(ranges, total):
    skipped = merged(ranges)
    out = {place for first, end in ranges for place in range(first, end)}
    assert {place for first, end in skipped for place in range(first, end)} == out
    assert all(one[1] < other[0] for one, other in pairwise(skipped))
    left = [place for place in range(200) if place not in out]
    assert [place_of(consumed, skipped) for consumed in range(100)] == left[:100]
    inside = [place for place in left if place < total]
    if skipped and inside:
        assert [place_of(consumed, skipped, total) for consumed in range(3 * len(inside))] == inside * 3


@given(RANGES, st.integers(0, 50), st.integers(0, 10), st.integers(1, 10))
def test_what_was_consumed_before_a_range_keeps_its_place(ranges, consumed, ahead, length):
    before = merged(ranges)
    first = place_of(consumed, before) + ahead
    after = merged([*before, (first, first + length)])
    assert [place_of(number, after) for number in range(consumed)] == [
        place_of(number, before) for number in range(consumed)
    ]
