import pytest

from megatron_lite.metrics.timers import Timers


class Machine:
    """Clock that advances on synchronization."""

    def __init__(self):
        self.now = 0.0
        self.pending = 0.0
        self.waits = 0

    def synchronize(self):
        self.waits += 1
        self.now += self.pending
        self.pending = 0.0

    def timers(self, level):
        return Timers(level, self.synchronize, lambda: self.now)


def test_a_block_includes_its_queued_work():
    machine = Machine()
    timers = machine.timers(1)
    machine.pending = 5.0  # queued before: not this block's
    with timers("forward"):
        machine.pending = 2.0
    with timers("backward"):
        machine.pending = 3.0
    with timers("forward"):
        machine.pending = 1.0
    assert timers.take() == {"forward": 3.0, "backward": 3.0}
    assert timers.take() == {}


def test_timers_nest_and_report_the_outer_first():
    machine = Machine()
    timers = machine.timers(2)
    with timers("step"):
        machine.pending = 1.0
        with timers("optimizer", level=2):
            machine.pending = 2.0
    assert list(timers.take().items()) == [("step", 3.0), ("optimizer", 2.0)]


def test_unmeasured_levels_do_not_synchronize():
    machine = Machine()
    timers = machine.timers(1)
    with timers("micro-batch", level=2):
        machine.pending = 1.0
    assert timers.take() == {} and machine.waits == 0


def test_unmeasured_levels_create_no_object():
    def never():
        raise AssertionError("a timer that is off reads no clock and waits for no device")

    timers = Timers(0, never, never)
    with timers("forward") as first, timers("forward") as second:
        assert first is second is None
    assert timers("forward") is timers("backward", level=2)


def test_a_failed_block_does_not_wait_for_the_device():
    machine = Machine()
    timers = machine.timers(1)
    with pytest.raises(ValueError), timers("forward"):
        raise ValueError
    assert machine.waits == 1 and "forward" in timers.take()


def test_a_timer_cannot_contain_itself():
    timers = Timers(1, lambda: None)
    with pytest.raises(AssertionError, match="forward"), timers("forward"), timers("forward"):
        pass
