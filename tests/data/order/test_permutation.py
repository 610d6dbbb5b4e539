"""Keyed permutation: bijective for every size, different for every epoch, close to uniform."""

from __future__ import annotations

import itertools
from collections import Counter
from math import factorial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.order.permutation import permute, round_keys

HUGE = 10**15


@settings(deadline=None)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_every_index_occurs_once(size, seed, epoch):
    keys = round_keys(seed, epoch)
    assert sorted(permute(index, size, keys) for index in range(size)) == list(range(size))


@given(size=st.integers(1, HUGE), data=st.data())
def test_indices_of_a_large_range_stay_in_it_and_differ(size, data):
    keys = round_keys(data.draw(st.integers(0, 99)), 0)
    indices = data.draw(st.sets(st.integers(0, size - 1), max_size=20))
    images = [permute(index, size, keys) for index in indices]
    assert len(set(images)) == len(images)
    assert all(0 <= image < size for image in images)


def test_the_permutation_does_not_change():
    """A resumed run relies on these values, on every machine and in every version."""
    assert [permute(index, 10, round_keys(1234, 0)) for index in range(10)] == [9, 8, 1, 3, 7, 0, 4, 5, 2, 6]
    assert [permute(index, 300_000_007, round_keys(1, 2)) for index in range(3)] == [113090616, 265293216, 176183356]


@pytest.mark.slow
def test_all_permutations_of_five_are_equally_frequent():
    epochs = 4_800
    found = Counter(
        tuple(permute(index, 5, keys) for index in range(5)) for keys in map(round_keys, [7] * epochs, range(epochs))
    )
    expected = epochs / factorial(5)
    assert len(found) == factorial(5)
    # 119 degrees of freedom: mean 119, standard deviation 15.4.
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 119 + 5 * 15.4


def test_neighbours_are_sent_to_independent_places():
    """The sums of neighbours' differences, and of the displacement, are those of a random order."""
    size, keys = 20_000, round_keys(3, 1)
    images = [permute(index, size, keys) for index in range(size)]
    distances = [abs(b - a) / size for a, b in itertools.pairwise(images)]
    displacements = [abs(image - index) / size for index, image in enumerate(images)]
    # Mean 1/3 with standard deviation 0.236 / sqrt(20,000) = 0.0017.
    assert abs(sum(distances) / len(distances) - 1 / 3) < 0.01
    assert abs(sum(displacements) / size - 1 / 3) < 0.01
    other = [permute(index, size, round_keys(3, 2)) for index in range(size)]
    assert sum(a == b for a, b in zip(images, other, strict=True)) < 12, "one is expected"
