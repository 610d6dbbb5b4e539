"""--split with the rounding of both generations, at known sizes and edge cases."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.order.split import parse_split, range_bounds, split_bounds
from megatron_lite.errors import ConfigError

OSCAR = 304_230_423


def test_tr1s_split_of_oscar():
    assert split_bounds("949,50,1", OSCAR, "legacy") == (0, 288714672, 303926193, OSCAR)
    assert split_bounds("949,50,1", OSCAR, "modern")[:2] == (0, 288714671)


@pytest.mark.parametrize("order", ["legacy", "modern"])
@pytest.mark.parametrize("split", ["949,50,1", "949/50/1"])
def test_accepted_forms(split, order):
    assert parse_split(split, order) == (0.949, 0.05, 0.001)


@pytest.mark.parametrize("order", ["legacy", "modern"])
def test_fewer_than_three_shares_leave_the_rest_empty(order):
    assert split_bounds("1", 10, order) == (0, 10, 10, 10)
    assert split_bounds("9,1", 10, order) == (0, 9, 10, 10)


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "-1,2,0", "nan,1,1", "1,inf"])
def test_an_invalid_split_is_refused(split):
    with pytest.raises(ConfigError, match="--split"):
        parse_split(split, "legacy")


@given(
    shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any),
    size=st.integers(0, 10**10),
    order=st.sampled_from(["legacy", "modern"]),
)
def test_bounds_do_not_decrease_and_end_at_the_size(shares, size, order):
    bounds = split_bounds(",".join(map(str, shares)), size, order)
    assert bounds[0] == 0
    assert bounds[3] == size
    assert all(low <= high for low, high in itertools.pairwise(bounds)) or size < 4


def test_ranges_round_both_ends():
    assert range_bounds(0.0, 0.95, 7) == (0, 7)
    assert range_bounds(0.95, 1.0, 7) == (7, 7)
    assert range_bounds(0.5, 1.0, 5) == (2, 5)
