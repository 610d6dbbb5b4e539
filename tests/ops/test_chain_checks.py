"""Tests of the checks of a run's queued jobs before another one is submitted."""

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops.chain import begin_job, start_chain, stop_chain
from megatron_lite.ops.chain_checks import queue_problems
from megatron_lite.ops.chain_state import Start, read_chain
from megatron_lite.ops.watch_job import run_comment
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.process import this_process


def test_one_chain_at_a_time_works_on_a_run(run, queue, tmp_path):
    begin_job(run, Start("100"))
    queue.states["100"] = "RUNNING"
    queue.states.pop("100")
    with pytest.raises(ConfigError, match=r"has a chain already: job 101 is pending.*slurm stop"):
        start_chain(run, tmp_path / "job.slurm", [], [])
    assert stop_chain(run).reason == "cancelled with `slurm stop`"
    assert not queue.states and read_chain(run).state == "stopped"
    start_chain(run, tmp_path / "job.slurm", [], [])
    assert read_chain(run).outcomes == () and read_chain(run).successor == "102"


def test_a_chain_is_refused_while_another_job_trains_in_the_folder(run, queue, tmp_path):
    stop_chain(run)
    process = this_process("n1", "77")
    with FolderLock(run, process=process, command="train"):
        queue.states["77"] = "RUNNING"
        with pytest.raises(ConfigError, match=r"Slurm job 77 trains in --save .*--dependency=afterany:77"):
            start_chain(run, tmp_path / "job.slurm", [], [])
        start_chain(run, tmp_path / "job.slurm", [], ["--dependency=afterany:77"])


def test_a_chain_is_refused_while_a_plain_job_of_the_run_is_queued(run, queue, tmp_path):
    stop_chain(run)
    queue.states["78_[1-3]"], queue.comments["78_[1-3]"] = "PENDING", run_comment(run)
    with pytest.raises(ConfigError, match=r"Slurm job 78 of the run .* is pending.*scancel 78.*afterany:78"):
        start_chain(run, tmp_path / "job.slurm", [], [])
    assert read_chain(run).state == "stopped"
    queue.comments.clear()
    start_chain(run, tmp_path / "job.slurm", [], [])


def test_a_plain_job_is_refused_beside_an_active_chain(run, queue):
    begin_job(run, Start("100"))
    queue.states["100"] = "RUNNING"
    (problem,) = queue_problems(run, chain=False)
    assert "has an active chain, which the job would disturb: job 100 is running" in str(problem)
    assert "megatron-lite slurm stop" in str(problem)
    stop_chain(run, after_current=True)
    assert list(queue_problems(run, chain=False)) == []
