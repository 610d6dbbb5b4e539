"""Time limit: leaves the save as many seconds as the slowest save so far."""

from __future__ import annotations

from megatron_lite.config.training import TrainingConfig
from megatron_lite.lifecycle.stopping import Stopper
from megatron_lite.schedules.progress import Progress

LIMIT = TrainingConfig(exit_duration_minutes=10)


def stop_at(seconds, reserve):
    now = 0.0
    stopper = Stopper(LIMIT, started=0.0, clock=lambda: now)
    now = seconds
    return stopper.after_iteration(Progress(iteration=1), reserve=reserve)


def test_the_save_ends_before_the_limit():
    assert stop_at(500.0, 90.0) is None
    stop = stop_at(520.0, 90.0)
    assert stop.status == "time_limit"
    assert stop.message == "exiting program after 8.7 minutes, leaving 90 s for the save"


def test_without_an_earlier_save_nothing_is_reserved():
    assert stop_at(599.0, 0.0) is None
    assert stop_at(601.0, 0.0).message == "exiting program after 10.0 minutes"


def evaluating(seconds, *, save=0.0, evaluation=None):
    stopper = Stopper(LIMIT, started=0.0, clock=lambda: seconds)
    if evaluation is None:
        return stopper.in_evaluation(save=save)
    return stopper.before_evaluation(evaluation=evaluation, save=save)


def test_an_evaluation_leaves_time_for_the_save():
    assert evaluating(500.0, save=90.0) is None
    assert evaluating(520.0, save=90.0).message == "exiting program after 8.7 minutes, leaving 90 s for the save"
    assert evaluating(601.0).status == "time_limit"


def test_an_evaluation_begins_if_it_ends_in_time_or_its_duration_is_unknown():
    assert evaluating(300.0, evaluation=200.0, save=90.0) is None
    stop = evaluating(320.0, evaluation=200.0, save=90.0)
    assert stop.message == "exiting program after 5.3 minutes, leaving 290 s for the evaluation and the save"
    assert evaluating(599.0, evaluation=0.0, save=90.0) is None
