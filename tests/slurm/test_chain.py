"""Tests of chained jobs on a Slurm cluster: whatever ends a job, the run ends as the one without interruption.

The runs that wait for Slurm (time limits, delay after a failure) are started first and judged last.
"""

import re

import pytest
from slurm.chained_run import ITERATIONS


@pytest.fixture(scope="module")
def time_limited(new_run, expected):
    """A run with a limit of one minute, Slurm's shortest, in which few iterations fit."""
    run = new_run("time_limited", flags="--job-end-margin-in-secs 5")
    run.submit("--time=1", pace=2.5)
    return run


@pytest.fixture(scope="module")
def killed_rank(new_run, expected):
    """A run of which one rank was killed: its next job is delayed by two minutes."""
    run = new_run("killed_rank")
    run.submit(pace=0.5)
    run.wait_for_iteration(14)
    run.kill_rank("n2")
    return run


def assert_equal(run, expected):
    run.wait_until_complete()
    assert run.losses() == expected
    run.assert_one_at_a_time()


def test_uninterrupted(expected, time_limited, killed_rank):
    assert expected[-1] < expected[0]


def test_scancel_of_the_running_job(new_run, cluster, expected):
    run = new_run("scancel")
    run.submit(pace=0.5)
    run.wait_for_iteration(14)
    cluster.run("scancel", run.job)
    run.wait_for_iteration(15, starts=2)
    run.pace(0)
    assert_equal(run, expected)


def test_usr1(new_run, cluster, expected):
    run = new_run("usr1")
    run.submit(pace=0.5)
    run.wait_for_iteration(14)
    cluster.run("scancel", "--signal=USR1", run.job)
    run.wait_for_iteration(15, starts=2)
    run.pace(0)
    assert_equal(run, expected)
    assert run.outcomes == ["signal", "completed"]


def test_requeue_as_by_preemption(new_run, cluster, expected):
    run = new_run("requeue")
    run.submit(pace=0.5)
    run.wait_for_iteration(14)
    job = run.job
    cluster.run("scontrol", "requeue", job)
    run.wait_for_iteration(15, starts=2)
    run.pace(0)
    assert_equal(run, expected)
    assert {tick[:2] for tick in run.ticks()} == {(int(job), 0), (int(job), 1)}, "the requeued job trains, no other"


def test_node_powered_off(new_run, cluster, expected):
    run = new_run("power")
    run.submit("--nodelist=n3,n4", pace=0.5)
    run.wait_for_iteration(14)
    job = run.job
    cluster.power_off("n3")
    run.wait_for(lambda: "PENDING" in cluster.run("squeue", "-h", "-j", job, "-o", "%T"), "requeue")
    cluster.power_on("n3")
    run.wait_for_iteration(11, starts=2)
    run.pace(0)
    assert_equal(run, expected)
    assert [outcome.start for outcome in run.chain.outcomes] == [job, f"{job}, restart 1"]
    assert run.ticks().count((int(job), 1, 11)) == 1, "it resumes from the checkpoint of iteration 10"


def test_full_disk(new_run, small_disk):
    run = new_run("full_disk", save=small_disk / "run")
    run.submit()
    run.wait_until_ended()
    (outcome,) = run.chain.outcomes
    assert (run.chain.state, outcome.status, outcome.iteration) == ("stopped", "error", 20)
    assert re.match(r"the disk is full: .*iteration 30", run.chain.reason)


def test_stop(new_run):
    run = new_run("stop")
    run.submit(pace=0.5)
    run.wait_for_iteration(2)
    with pytest.raises(RuntimeError, match=r"has a chain already: job \d+ is running"):
        run.submit()
    assert "stopped: cancelled with `slurm stop`" in run.slurm("stop", run.save)
    run.wait_until_ended()
    assert len({tick[:2] for tick in run.ticks()}) == 1
    status = run.status()
    assert (status["state"], status["queue"]) == ("stopped", [])
    (outcome,) = status["outcomes"]
    assert outcome["status"] == "signal" and outcome["iteration"] > 0


def test_jobs_cancelled_one_by_one(new_run):
    run = new_run("cancelled")
    run.submit(pace=0.5)
    run.wait_for_iteration(2)
    waiting, running = run.chain.successor, run.chain.job.job
    with pytest.raises(RuntimeError, match=r"has an active chain, which the job would disturb: job \d+ is running"):
        run.slurm("submit", run.script)
    run.cluster.run("scancel", waiting)
    run.wait_for(lambda: "no job follows" in run.slurm("status", run.save), "cancelled job", 30)
    run.cluster.run("scancel", running)
    run.wait_for(lambda: run.status()["state"] == "stopped", "end of the chain", 60)
    assert run.status()["reason"] == f"job {waiting}, which waited for the end of job {running}, was cancelled"
    assert run.outcomes == ["signal"]


def test_killed_rank(killed_rank, expected):
    killed_rank.pace(0)
    assert_equal(killed_rank, expected)
    first, last = killed_rank.chain.outcomes
    assert (first.status, first.host, last.status) == ("error", "n2", "completed")


def test_time_limits(time_limited, expected):
    time_limited.wait_for(lambda: len(time_limited.outcomes) >= 3, "third time limit", 400)
    time_limited.pace(0)
    assert_equal(time_limited, expected)
    assert time_limited.outcomes == ["time_limit"] * (len(time_limited.outcomes) - 1) + ["completed"]
    assert time_limited.ticks()[-1][2] == ITERATIONS
