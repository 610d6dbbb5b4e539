from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.checkpoint import CheckpointConfig, SavePhase
from megatron_lite.schedules.saves import is_save_iteration, save_iterations


def _iterations(checkpoint, last_iteration):
    return list(chain.from_iterable(save_iterations(checkpoint, last_iteration)))


def config(*phases):
    return CheckpointConfig(phases=tuple(SavePhase(interval=interval, until=until) for interval, until in phases))


def test_phases_follow_each_other():
    # --save-schedule "10:100 18:1000 1500"
    saves = _iterations(config((10, 100), (18, 1000), (1500, 0)), 4000)
    assert saves[:12] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 108, 126]
    assert saves[-4:] == [972, 990, 1500, 3000]


def test_a_save_after_each_of_a_billion_iterations_takes_no_memory():
    assert save_iterations(config((1, 0)), 10**12) == [range(1, 10**12 + 1)]


def test_no_phase_saves_nothing_and_a_bounded_one_stops():
    assert _iterations(config(), 100) == []
    assert _iterations(config((10, 25)), 100) == [10, 20]
    assert not is_save_iteration(config((10, 25)), 30)
    assert not is_save_iteration(config((10, 0)), 0)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300)), max_size=4),
    st.one_of(st.none(), st.integers(0, 40)),
    st.integers(0, 400),
)
def test_ranges_equal_the_check_of_each_iteration(bounded, last_interval, last_iteration):
    phases = sorted(bounded, key=lambda phase: phase[1])
    checkpoint = config(*phases, *([] if last_interval is None else [(last_interval, 0)]))
    asked = [iteration for iteration in range(last_iteration + 1) if is_save_iteration(checkpoint, iteration)]
    assert _iterations(checkpoint, last_iteration) == asked
