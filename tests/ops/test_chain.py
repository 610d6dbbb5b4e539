"""Tests of the job chain with stand-ins for Slurm's programs, which keep a queue in a folder."""

import json
import shlex
from types import SimpleNamespace

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import chain as module
from megatron_lite.ops import slurm
from megatron_lite.ops.chain import Start, begin_job, end_job, read_chain, start_chain, stop_chain
from megatron_lite.runs.exit_status import ExitStatus


@pytest.fixture
def queue(monkeypatch):
    """A queue: the options of each job that was submitted, the state of each, and other calls."""

    queue = SimpleNamespace(options={}, states={}, calls=[])

    def submit(options, script, arguments=()):
        job = str(100 + len(queue.options))
        queue.options[job], queue.states[job] = list(options), "PENDING"
        return job

    def call(*command):
        queue.calls.append(command)
        return ""

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "job_state", lambda job: queue.states.get(job))
    monkeypatch.setattr(slurm, "cancel", lambda job: queue.states.pop(job, None))
    monkeypatch.setattr(slurm, "call", call)
    return queue


@pytest.fixture
def run(tmp_path, queue):
    script = tmp_path / "job.slurm"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2\n# a comment\n#SBATCH --time=20:00:00\n\nsrun train\n#SBATCH --not=this\n"
    )
    folder = tmp_path / "run"
    assert start_chain(folder, script, ["a b"], ["--partition=long"]) == "100"
    return folder


def ends(folder, status, *, job, restart=0, saved=0, host="n1"):
    """Leave what a training job leaves."""
    text = ExitStatus(
        status=status, message=f"it was {status}", host=host, job=f"Slurm step {job}.0, restart {restart}.0"
    )
    (folder / "exit_status.json").write_bytes(text.encode())
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{saved}\n", encoding="utf-8")


def test_the_script_of_a_chain_wraps_the_users(run, queue):
    lines = (run / "chain.slurm").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --nodes=2",
        "#SBATCH --time=20:00:00",
        "#SBATCH --open-mode=append",
    ]
    assert f"{shlex.join(['bash', str(run.parent / 'job.slurm'), 'a b'])} &" in lines
    assert queue.options["100"] == ["--partition=long"]


def test_each_job_submits_its_successor_until_the_run_is_complete(run, queue):
    for job, saved in (("100", 10), ("101", 20)):
        chain, goes_on = begin_job(run, Start(job))
        assert goes_on and f"--dependency=afterany:{job}" in queue.options[chain.successor]
        ends(run, "time_limit", job=job, saved=saved)
        if job == "100":
            end_job(run, Start(job))
    chain, goes_on = begin_job(run, Start("102"))
    assert goes_on and [outcome.iteration for outcome in chain.outcomes] == [10, 20]
    ends(run, "completed", job="102", saved=30)
    chain = end_job(run, Start("102"))
    assert (chain.state, chain.reason) == ("completed", "it was completed") and "103" not in queue.states
    assert not begin_job(run, Start("103"))[1], "a successor that started all the same does not train"


def test_failures_without_progress_delay_and_stop_the_chain(run, queue):
    for number in range(module.MAX_FAILURES):
        job = str(100 + number)
        chain, goes_on = begin_job(run, Start(job))
        assert goes_on
        ends(run, "error", job=job, saved=7, host=f"n{number}")
        chain = end_job(run, Start(job))
        if number < module.MAX_FAILURES - 1:
            assert (
                "scontrol",
                "update",
                f"JobId={chain.successor}",
                f"StartTime=now+{2 * 2**number}minutes",
            ) in queue.calls
    assert chain.state == "stopped" and "3 failures in a row at iteration 7; the last: it was error" in chain.reason
    assert chain.successor not in queue.states


def test_progress_between_failures_keeps_the_chain_going(run, queue):
    for number in range(5):
        job = str(100 + number)
        begin_job(run, Start(job))
        ends(run, "error", job=job, saved=number + 1, host=f"n{number}")
        chain = end_job(run, Start(job))
    assert chain.state == "active" and chain.failures == 1


def test_a_host_that_fails_twice_is_excluded(run, queue):
    for number in range(2):
        job = str(100 + number)
        begin_job(run, Start(job))
        ends(run, "error", job=job, saved=number, host="n7")
        chain = end_job(run, Start(job))
    assert chain.excluded == ("n7",) and queue.calls[-1][-1] == "ExcNodeList=n7"
    chain, _ = begin_job(run, Start("102"))
    assert "--exclude=n7" in queue.options[chain.successor]


def test_a_job_that_was_killed_is_judged_by_its_successor(run, queue):
    begin_job(run, Start("100"))
    ends(run, "error", job="99", saved=4)  # left by a job before the chain
    queue.states.pop("100", None)
    chain, goes_on = begin_job(run, Start("101"))
    assert goes_on and (chain.outcomes[-1].status, chain.outcomes[-1].iteration) == ("killed", 4)


def test_a_requeued_job_keeps_its_successor(run, queue):
    chain, _ = begin_job(run, Start("100"))
    ends(run, "error", job="100", saved=3)
    end_job(run, Start("100"))
    again, goes_on = begin_job(run, Start("100", 1))
    assert goes_on and again.successor == chain.successor == "101" and len(queue.options) == 2
    ends(run, "time_limit", job="100", restart=1, saved=8)
    assert [outcome.start for outcome in end_job(run, Start("100", 1)).outcomes] == ["100", "100, restart 1"]


def test_one_chain_at_a_time_works_on_a_run(run, queue, tmp_path):
    with pytest.raises(ConfigError, match=r"is active: job 101 is pending.*slurm stop"):
        begin_job(run, Start("100"))
        queue.states.pop("100")
        start_chain(run, tmp_path / "job.slurm", [], [])
    stop_chain(run)
    assert not queue.states and read_chain(run).state == "stopped"
    start_chain(run, tmp_path / "job.slurm", [], [])
    assert read_chain(run).outcomes == ()


def test_a_damaged_or_absent_chain_is_an_error(run):
    (run / "chain.json").write_text(json.dumps({"script": 3}))
    with pytest.raises(ConfigError, match=r"Cannot read .*chain\.json.*submit the job again"):
        read_chain(run)
    with pytest.raises(ConfigError, match=r"has no chain"):
        end_job(run.parent, Start("1"))


def test_hosts_of_the_exclude_file_are_excluded_beside_the_users_own(run, queue, capsys):
    script = run / "chain.slurm"
    script.write_text(script.read_text().replace("#SBATCH --nodes=2", "#SBATCH --nodes=2 --exclude=n7"))
    (run / "excluded_nodes.txt").write_text("n3  # slow\n")
    begin_job(run, Start("100"))
    assert "--exclude=n7,n3" in queue.options["101"]
    (run / "excluded_nodes.txt").write_text("n3 slow\n")
    begin_job(run, Start("101"))
    assert "--exclude=n7" in queue.options["102"] and "no host name" in capsys.readouterr().err
