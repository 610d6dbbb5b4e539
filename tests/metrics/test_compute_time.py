"""Tests of the compute time of a rank."""

from contextlib import nullcontext

import pytest

from megatron_lite.metrics.compute_time import ComputeTime, busy_seconds, mean_parts, measuring_interval


class Machine:
    """A backend whose clock the test sets; `busy`: it has not reached the last mark."""

    def __init__(self):
        self.now, self.marks, self.busy = 0.0, 0, False

    def mark(self):
        self.marks += 1
        return self.now

    def seconds_between(self, begin, end):
        return None if self.busy else end - begin


def run(clock, machine, iteration, blocks):
    clock.begin(iteration)
    for name, seconds in blocks:
        with clock.around(name, nullcontext()):
            machine.now += seconds


BLOCKS = [
    *(("batch-generator", 1.0), ("forward-compute", 2.0), ("pipeline-messages", 50.0), ("backward-compute", 4.0)),
    *(("all-grads-sync", 0.5), ("optimizer", 0.25)),
]


def test_messages_are_left_out():
    machine = Machine()
    clock = ComputeTime(machine, 5)
    run(clock, machine, 10, BLOCKS)
    assert clock.measures and clock.take() == [6.0, 1.0, 0.5, 0.25]
    assert not clock.measures


def test_other_iterations_set_no_marks():
    machine = Machine()
    for clock, iteration in ((ComputeTime(machine, 5), 11), (ComputeTime(machine, 0), 10)):
        run(clock, machine, iteration, BLOCKS)
        assert not clock.measures
    assert machine.marks == 0


def test_a_device_that_is_behind_gives_no_time():
    machine = Machine()
    clock = ComputeTime(machine, 1)
    run(clock, machine, 1, BLOCKS)
    machine.busy = True
    assert clock.take() == [0.0] * 4


def test_means_leave_out_ranks_without_times():
    ranks = [[6.0, 1.0, 0.5, 0.25], [0.0] * 4, [4.0, 3.0, 1.5, 0.75]]
    assert mean_parts(ranks) == {"compute": 5.0, "data": 2.0, "gradients": 1.0, "optimizer": 0.5}
    assert busy_seconds(ranks) == [7.0, 0.0, 7.0]
    assert mean_parts([]) == mean_parts([[0.0] * 4]) == {}


def test_a_single_rank_is_measured_at_most_every_ten_iterations():
    assert [measuring_interval(log_interval, 1) for log_interval in (1, 3, 10, 25)] == [10, 12, 10, 25]
    assert measuring_interval(1, 2) == 1


def test_a_block_that_fails_passes_its_error_on():
    clock = ComputeTime(Machine(), 1)
    clock.begin(1)
    with pytest.raises(ValueError), clock.around("forward-compute", nullcontext()):
        raise ValueError
