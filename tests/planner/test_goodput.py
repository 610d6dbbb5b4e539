"""Tests of goodput against Young's and Daly's formulas and a simulation."""

import math
import random

import pytest

from megatron_lite.planner.goodput import best_interval, expected_seconds, goodput


def test_short_saves_give_youngs_interval():
    assert best_interval(1.0, 1e6) == pytest.approx(math.sqrt(2e6), rel=0.01)
    assert best_interval(300.0, 100.0) == 100.0


def test_the_best_interval_has_the_least_time():
    for save, mean in ((10.0, 10_000.0), (300.0, 20_000.0)):
        best = best_interval(save, mean)
        times = {
            factor: expected_seconds(1e6, factor * best, save, 60.0, mean) for factor in (0.5, 0.8, 1.0, 1.25, 2.0)
        }
        assert min(times, key=times.get) == 1.0


def test_expected_time_is_that_of_simulated_failures():
    draw, between, save, restart, mean = random.Random(7), 100.0, 5.0, 20.0, 600.0

    def run():
        clock, left = 0.0, 10
        failure = draw.expovariate(1 / mean)
        while left:
            if failure >= between + save:
                clock += between + save
                failure -= between + save
                left -= 1
                continue
            clock += failure
            # Failures during the restart begin it again.
            while (failure := draw.expovariate(1 / mean)) < restart:
                clock += failure
            clock += restart
            failure -= restart
        return clock

    mean_time = sum(run() for _ in range(4000)) / 4000
    assert expected_seconds(1000.0, between, save, restart, mean) == pytest.approx(mean_time, rel=0.02)


def test_without_failures_goodput_is_one():
    found = goodput(useful=1e5, between=1e3, save=0.0, restart=600, node_hours=1e12, nodes=10)
    assert found.share == pytest.approx(1.0) and found.failures == pytest.approx(0.0, abs=1e-6)
    assert found.lost_seconds == pytest.approx(0.0, abs=1e-3)


def test_more_nodes_fail_more_often():
    small, large = (
        goodput(useful=1e6, between=3600, save=30, restart=600, node_hours=6000, nodes=nodes) for nodes in (10, 1000)
    )
    assert large.failure_seconds == pytest.approx(small.failure_seconds / 100)
    assert large.share < small.share and large.best_seconds < small.best_seconds
    assert large.best_share >= large.share


def test_a_run_that_never_saves_may_never_end():
    found = goodput(useful=1e8, between=math.inf, save=0, restart=60, node_hours=10, nodes=1000)
    assert found.share == 0 and math.isinf(found.lost_seconds)
