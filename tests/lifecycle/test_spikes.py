"""Spike detection: positions, limits, and continuation from a saved state."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.lifecycle.spikes import WINDOW, Spike, SpikeDetector


def watched(losses, watch=None, begin=0):
    watch = watch or SpikeDetector(2.0, 3)
    found = [watch.observe(number + 1, loss, 4 * number, 4) for number, loss in enumerate(losses[begin:], begin)]
    return [spike for spike in found if spike], watch


def test_a_spike_is_confirmed_after_patience_losses():
    losses = [3.0] * 10 + [5.0, 7.0, 9.0, 6.5, 8.0, 3.0]
    (spike,), watch = watched(losses)
    # 5 is below twice the usual loss. Iteration 12 is the first above it; its step's cause may be iteration 11's.
    assert spike == Spike(first=12, last=14, loss=9.0, usual=3.0, consumed=(40, 56))
    assert watch.ranges() == ((12, 15),)


def test_a_short_rise_is_no_spike():
    found, watch = watched([3.0] * 10 + [7.0, 7.0, 3.0] * 4)
    assert not found
    assert watch.ranges() == ()


def test_a_rise_counts_in_ranges_before_it_is_confirmed():
    assert watched([3.0] * 10 + [7.0])[1].ranges() == ((11, None),)


def test_nan_is_too_high():
    (spike,), _ = watched([3.0] * 10 + [math.nan] * 3)
    assert spike.first == 11


def test_a_lasting_rise_becomes_the_new_normal():
    found, watch = watched([3.0] * 10 + [7.0] * (2 * WINDOW))
    assert len(found) == 1
    assert watch.ranges() == ((11, 10 + WINDOW),)


def test_the_first_losses_are_not_compared():
    assert watched([50.0, 90.0, 80.0, 10.0, 30.0, 30.0, 30.0])[0] == []


@given(st.lists(st.sampled_from([1.0, 1.1, 5.0, math.nan]), max_size=60), st.integers(0, 60))
def test_a_restored_detector_finds_the_same_spikes(losses, cut):
    cut = min(cut, len(losses))
    whole, _ = watched(losses)
    before, watch = watched(losses[:cut])
    resumed = SpikeDetector(2.0, 3)
    resumed.load(json.loads(json.dumps(watch.state(), allow_nan=False)))
    after, resumed = watched(losses, resumed, cut)
    assert [(s.first, s.last, s.consumed) for s in before + after] == [(s.first, s.last, s.consumed) for s in whole]


def test_a_factor_of_0_disables_detection():
    assert watched([3.0] * 10 + [math.nan] * 10, SpikeDetector(0.0, 1))[0] == []
