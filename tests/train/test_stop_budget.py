"""Time limits, by flag and by Slurm: leave the save enough time, by the slowest save so far."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megatron_lite.backend.job_end import JobEnd
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import ConfigError
from megatron_lite.lifecycle.stopping import Stopper
from megatron_lite.schedules.progress import Progress

LIMIT = TrainingConfig(exit_duration_minutes=10)


def stop_at(seconds, reserve):
    now = 0.0
    stopper = Stopper(LIMIT, started=0.0, clock=lambda: now)
    now = seconds
    return stopper.after_iteration(Progress(iteration=1), save=reserve)


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


SLURM = TrainingConfig(job_end_margin=30)


def in_slurm_job(left, *, config=SLURM, asked=None, started=0.0, first_save=40.0):
    end = JobEnd("7", time.time() + left, ask=lambda: asked and time.time() + asked, notify=lambda text: None)
    return Stopper(config, started=started, job_end=end, first_save=first_save, clock=lambda: 0.0)


def stop_in_slurm_job(left, *, save, iteration=0.0, **options):
    return in_slurm_job(left, **options).after_iteration(Progress(iteration=1), save=save, iteration=iteration)


@pytest.mark.parametrize(
    ("save", "iteration", "kept"),
    [(100.0, 0.0, 180.0), (100.0, 20.0, 200.0), (0.0, 0.0, 70.0), (None, 5.0, 35.0)],
    ids=["measured save", "next iteration", "no save so far", "no --save"],
)
def test_the_save_ends_before_the_slurm_job(save, iteration, kept):
    """The save has 1.5 times the slowest so far, or a default, and 30 s remain after it."""
    assert stop_in_slurm_job(kept + 5, save=save, iteration=iteration) is None
    stop = stop_in_slurm_job(kept - 5, save=save, iteration=iteration)
    assert (stop.status, stop.limit) == ("time_limit", "--time of the Slurm job")
    assert "before the end of Slurm job 7, leaving" in stop.message


def test_a_raised_time_limit_is_noticed_before_the_run_stops():
    assert stop_in_slurm_job(10, save=1.0, asked=3600) is None
    assert stop_in_slurm_job(10, save=1.0, asked=None).status == "time_limit"


def test_an_evaluation_leaves_time_before_the_end_of_the_slurm_job():
    assert in_slurm_job(300).before_evaluation(evaluation=100.0, save=100.0) is None
    stop = in_slurm_job(270).before_evaluation(evaluation=100.0, save=100.0)
    assert "leaving 250 s for the evaluation and the save and 30 s after it" in stop.message
    assert in_slurm_job(60).in_evaluation(save=None, step=20.0) is None
    assert in_slurm_job(60).in_evaluation(save=None, step=40.0).status == "time_limit"


def test_the_start_line_names_the_earlier_limit():
    assert Stopper(TrainingConfig()).describe_time_limit(save=1.0) == ""
    assert (
        in_slurm_job(3600)
        .describe_time_limit(save=60.0)
        .endswith("in 01:00:00: 90 s for the save and 30 s after it (--job-end-margin-in-secs) are kept free")
    )
    both = replace(SLURM, exit_duration_minutes=10)
    assert (
        in_slurm_job(3600, config=both).describe_time_limit(save=60.0).endswith("because of --exit-duration-in-mins 10")
    )
    assert "because of Slurm job 7" in in_slurm_job(600, config=both).describe_time_limit(save=60.0)


def test_a_job_too_short_for_a_save_is_warned_of_and_one_too_short_for_the_margin_refused():
    line = in_slurm_job(65).describe_time_limit(save=0.0)
    assert line.startswith("WARNING: Slurm job 7, which ends at ")
    assert "too little time to keep 40 s for the save and 30 s after it (--job-end-margin-in-secs) free" in line
    with pytest.raises(
        ConfigError, match=r"Slurm job 7 ends in 3600 s \(at .*\), and --job-end-margin-in-secs 7200 reserves"
    ):
        in_slurm_job(3600, config=TrainingConfig(job_end_margin=7200)).describe_time_limit(save=0.0)
    # A slow start-up counts: the margin fits into the job, and the run stops after one iteration.
    late = in_slurm_job(20, started=-600.0)
    assert late.describe_time_limit(save=0.0).startswith("WARNING")
