"""Tests of the compute time of a rank."""

from contextlib import nullcontext

import pytest

from megatron_lite.metrics.compute_time import ComputeTime


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


BLOCKS = [("batch-generator", 1.0), ("forward-compute", 2.0), ("pipeline-messages", 50.0), ("backward-compute", 4.0)]


def test_messages_are_left_out():
    machine = Machine()
    clock = ComputeTime(machine, 5)
    run(clock, machine, 10, BLOCKS)
    assert clock.measures and clock.take() == 7.0
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
    assert clock.take() == 0.0


def test_a_block_that_fails_passes_its_error_on():
    clock = ComputeTime(Machine(), 1)
    clock.begin(1)
    with pytest.raises(ValueError), clock.around("forward-compute", nullcontext()):
        raise ValueError
