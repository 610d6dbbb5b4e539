"""Tests of the choice of recomputed layers."""

from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.recompute import recompute_units


def units(layers, **config):
    return [(list(numbers), again) for numbers, again in recompute_units(layers, RecomputeConfig(**config))]


def test_recompute_units():
    assert units(3) == units(3, granularity="selective") == [([0, 1, 2], False)]
    assert units(5, granularity="full", num_layers=2) == [([0, 1], True), ([2, 3], True), ([4], True)]
    assert units(2, granularity="full", num_layers=9) == [([0, 1], True)]
    assert units(4, granularity="full", method="block", num_layers=1) == [([0], True), ([1, 2, 3], False)]
    assert units(2, granularity="full", method="block", num_layers=5) == [([0], True), ([1], True)]
    assert units(2, granularity="full", method="block", num_layers=0) == [([0, 1], False)]
