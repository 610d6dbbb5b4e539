"""Tests of the job chain with stand-ins for Slurm's programs, which keep a queue in a folder."""

import errno
import shlex

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import chain as module
from megatron_lite.ops import chain_state, slurm
from megatron_lite.ops.chain import begin_job, end_job, settled_chain, start_chain, stop_chain
from megatron_lite.ops.chain_script import script_changed
from megatron_lite.ops.chain_state import MAX_FAILURES, Start, read_chain
from megatron_lite.runs.exit_status import ExitStatus
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.process import ProcessId, this_process

DOWN = ConfigError("sbatch failed: Unable to contact slurm controller", fix="")


def begins(run, queue, job, restart=0):
    """Start a job as Slurm does; return the chain."""
    chain, refusal = begin_job(run, Start(job, restart))
    assert not refusal
    queue.states[job] = "RUNNING"
    return chain


def ends(run, status, *, job, restart=0, saved=0, host="n1", failed_saves=()):
    """Leave what a training job leaves."""
    text = ExitStatus(
        status=status,
        message=f"it was {status}",
        host=host,
        failed_saves=failed_saves,
        job=f"Slurm step {job}.0, restart {restart}.0",
    )
    (run / "exit_status.json").write_bytes(text.encode())
    (run / "latest_checkpointed_iteration.txt").write_text(f"{saved}\n", encoding="utf-8")


def test_the_script_of_a_chain_wraps_a_copy_of_the_users(run, queue):
    lines = (run / "chain.slurm").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --nodes=2",
        "#SBATCH --time=20:00:00",
        "#SBATCH --open-mode=append",
    ]
    assert f"{shlex.join(['bash', str(run / 'chain_script.slurm'), 'a b'])} &" in lines
    assert queue.options["100"] == ["--partition=long"]
    script = run.parent / "job.slurm"
    assert not script_changed(run, str(script))
    script.write_text("#!/bin/bash\nsrun something else\n")
    assert script_changed(run, str(script)) and "srun train" in (run / "chain_script.slurm").read_text()


def test_each_job_submits_its_successor_until_the_run_is_complete(run, queue):
    for job, saved in (("100", 10), ("101", 20)):
        chain = begins(run, queue, job)
        assert f"--dependency=afterany:{job}" in queue.options[chain.successor]
        ends(run, "time_limit", job=job, saved=saved)
        if job == "100":
            end_job(run, Start(job))
    chain = begins(run, queue, "102")
    assert [outcome.iteration for outcome in chain.outcomes] == [10, 20]
    ends(run, "completed", job="102", saved=30)
    chain = end_job(run, Start("102"))
    assert (chain.state, chain.reason) == ("completed", "it was completed") and "103" not in queue.states
    chain, refusal = begin_job(run, Start("103"))  # Slurm started it before it was cancelled
    assert refusal == "the chain is completed: it was completed" and chain.job == Start("102")


@pytest.mark.parametrize("status", ["kill_switch", "exit_flag"])
def test_a_run_that_the_user_ends_stops_the_chain(run, queue, status):
    begins(run, queue, "100")
    ends(run, status, job="100", saved=3)
    assert end_job(run, Start("100")).state == "stopped" and "101" not in queue.states


def test_failures_without_progress_delay_and_stop_the_chain(run, queue):
    for number in range(MAX_FAILURES):
        job = str(100 + number)
        begins(run, queue, job)
        ends(run, "error", job=job, saved=7, host=f"n{number}")
        chain = end_job(run, Start(job))
        if number < MAX_FAILURES - 1:
            assert (
                "scontrol",
                "update",
                f"JobId={chain.successor}",
                f"StartTime=now+{2 * 2**number}minutes",
            ) in queue.calls
    assert chain.state == "stopped" and "3 failures in a row at iteration 7; the last: it was error" in chain.reason
    assert chain.successor not in queue.states


def test_a_full_disk_stops_the_chain_at_once(run, queue):
    begins(run, queue, "100")
    ends(run, "error", job="100", saved=4, failed_saves=[8])
    chain = end_job(run, Start("100"))
    assert (chain.state, chain.reason) == ("stopped", "the disk is full: it was error")
    assert "101" not in queue.states


def test_the_state_is_written_to_a_full_disk_by_giving_up_a_reserve(run, queue, monkeypatch):
    replace_file = chain_state.replace_file

    def full(path, content):
        if (run / "chain.reserve").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(path, content)

    monkeypatch.setattr(chain_state, "replace_file", full)
    begins(run, queue, "100")
    assert read_chain(run).job == Start("100") and not (run / "chain.reserve").exists()


def test_a_disk_with_no_room_for_the_state_gets_no_successor(run, queue, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chain_state, "replace_file", full)
    with pytest.raises(ConfigError, match=r"Cannot write the state of the chain to .*run: No space left.*df -h"):
        begin_job(run, Start("100"))
    assert list(queue.options) == ["100"]


def test_a_host_that_fails_twice_is_excluded(run, queue):
    for number in range(2):
        job = str(100 + number)
        begins(run, queue, job)
        ends(run, "error", job=job, saved=number, host="n7")
        chain = end_job(run, Start(job))
    assert chain.excluded == ("n7",) and queue.calls[-1][-1] == "ExcNodeList=n7"
    chain = begins(run, queue, "102")
    assert "--exclude=n7" in queue.options[chain.successor]


def test_the_hosts_of_the_exclude_file_and_of_the_user_are_excluded(run, queue, tmp_path):
    (run / "excluded_nodes.txt").write_text("n3  # slow\n")
    chain = begins(run, queue, "100")
    assert "--exclude=n3" in queue.options[chain.successor]
    (run / "excluded_nodes.txt").write_text("n3  # slow\nn4\n")
    ends(run, "time_limit", job="100", saved=1)
    end_job(run, Start("100"))
    assert queue.calls[-1] == ("scontrol", "update", "JobId=101", "ExcNodeList=n3,n4")


@pytest.mark.parametrize(
    ("state", "status", "failures"),
    [("NODE_FAIL", "killed", 1), (None, "killed", 1), ("CANCELLED", "cancelled", 0), ("PREEMPTED", "cancelled", 0)],
)
def test_a_job_that_was_killed_is_judged_by_its_successor(run, queue, state, status, failures):
    begins(run, queue, "100")
    ends(run, "error", job="99", saved=4)  # left by a job before the chain
    queue.states.pop("100")
    queue.final["100"] = state
    chain = begins(run, queue, "101")
    assert (chain.outcomes[-1].status, chain.outcomes[-1].iteration, chain.failures) == (status, 4, failures)
    assert chain.outcomes[-1].message == f"ended without an exit status{f' (Slurm: {state})' if state else ''}"


def test_a_rollback_after_a_kill_is_no_end_of_a_job(run, queue):
    begins(run, queue, "100")
    queue.states.pop("100")
    queue.final["100"] = "NODE_FAIL"
    status = ExitStatus(status="rolled_back", message="rolled back", time="2027-01-15T08:00:00+00:00")
    (run / "exit_status.json").write_bytes(status.encode())
    assert begins(run, queue, "101").outcomes[-1].status == "killed"


def test_a_requeued_job_keeps_its_successor(run, queue):
    chain = begins(run, queue, "100")
    ends(run, "error", job="100", saved=3)
    end_job(run, Start("100"))
    again = begins(run, queue, "100", 1)
    assert again.successor == chain.successor == "101" and len(queue.options) == 2
    again = begins(run, queue, "100", 2)  # without an exit status
    ends(run, "time_limit", job="100", restart=2, saved=8)
    assert [(past.start, past.status) for past in end_job(run, Start("100", 2)).outcomes] == [
        ("100", "error"),
        ("100, restart 1", "requeued"),
        ("100, restart 2", "time_limit"),
    ]


def test_a_job_trains_although_its_successor_cannot_be_submitted_yet(run, queue):
    queue.refuse = DOWN
    chain = begins(run, queue, "100")
    assert chain.warning == "the next job is not submitted yet: sbatch failed: Unable to contact slurm controller"
    queue.refuse = None
    ends(run, "time_limit", job="100", saved=3)
    chain = end_job(run, Start("100"))
    assert (chain.successor, chain.warning) == ("101", "") and "--dependency=afterany:100" in queue.options["101"]


def test_a_job_that_may_submit_no_other_requeues_itself(run, queue, monkeypatch):
    queue.refuse = ConfigError("sbatch failed: QOSMaxSubmitJobPerUserLimit", fix="")
    begins(run, queue, "100")
    ends(run, "time_limit", job="100", saved=3)
    chain = end_job(run, Start("100"))
    assert queue.calls[-1] == ("scontrol", "requeue", "100") and chain.state == "active"
    assert chain.warning == "job 100 was requeued: sbatch failed: QOSMaxSubmitJobPerUserLimit"

    def refuse(*command):
        raise ConfigError("scontrol failed: Requested operation is presently disabled", fix="")

    monkeypatch.setattr(slurm, "call", refuse)
    begins(run, queue, "100", 1)
    ends(run, "time_limit", job="100", restart=1, saved=4)
    chain = end_job(run, Start("100", 1))
    assert chain.state == "stopped" and chain.reason == (
        "no further job could be submitted (sbatch failed: QOSMaxSubmitJobPerUserLimit) and the job not requeued "
        "(scontrol failed: Requested operation is presently disabled)"
    )


def test_slurm_that_does_not_answer_delays_nothing(run, queue):
    begins(run, queue, "100")
    queue.down = True
    assert begins(run, queue, "100", 1).warning.startswith("the next job is not submitted yet: ")
    ends(run, "error", job="100", restart=1, saved=3)
    chain = end_job(run, Start("100", 1))
    assert chain.state == "active" and "is not delayed: sbatch failed" in chain.warning and chain.successor == "101"


def test_cancelling_the_waiting_job_ends_the_chain(run, queue):
    begins(run, queue, "100")
    queue.states.pop("101")
    ends(run, "time_limit", job="100", saved=3)
    chain = end_job(run, Start("100"))
    assert chain.state == "stopped" and len(queue.options) == 2
    assert chain.reason == "job 101, which waited for the end of job 100, was cancelled"


def test_a_chain_may_end_when_its_next_job_begins(run, queue):
    begins(run, queue, "100")
    ends(run, "completed", job="100", saved=5)  # and the node fails before the script has ended
    _, refusal = begin_job(run, Start("101"))
    assert refusal == "the chain is completed: it was completed"
    assert len(queue.options) == 2 and read_chain(run).state == "completed"


def test_a_job_that_is_not_the_chains_does_not_train(run, queue):
    begins(run, queue, "100")
    _, refusal = begin_job(run, Start("150"))
    assert refusal == "it is not of this chain, whose job 100 is running" and len(queue.options) == 2
    assert read_chain(run).job == Start("100")
    queue.states.clear()
    begins(run, queue, "150")  # sbatch chain.slurm by hand, after all jobs were cancelled


def test_stopping_may_leave_the_running_job(run, queue):
    begins(run, queue, "100")
    stop_chain(run, after_current=True)
    assert queue.states == {"100": "RUNNING"}
    ends(run, "time_limit", job="100", saved=3)
    chain = end_job(run, Start("100"))
    assert (chain.state, chain.reason) == ("stopped", "cancelled with `slurm stop`")
    assert [outcome.status for outcome in chain.outcomes] == ["time_limit"]


def test_a_chain_whose_first_job_is_refused_leaves_no_chain(run, queue, tmp_path):
    queue.refuse = ConfigError("sbatch failed: Invalid partition name specified", fix="")
    with pytest.raises(ConfigError, match="Invalid partition"):
        start_chain(tmp_path / "other", tmp_path / "job.slurm", [], [])
    assert read_chain(tmp_path / "other") is None
    stop_chain(run)
    with pytest.raises(ConfigError, match="Invalid partition"):
        start_chain(run, tmp_path / "job.slurm", [], [])
    assert read_chain(run).state == "stopped"


def test_the_end_of_a_script_waits_for_the_end_of_training(run, queue, monkeypatch):
    begins(run, queue, "100")
    lock = FolderLock(run, process=this_process("n1", "100"), command="train")
    lock.acquire()

    def sleep(seconds):
        ends(run, "signal", job="100", saved=9)
        lock.release()

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert end_job(run, Start("100")).outcomes[-1].status == "signal"


def test_an_expired_lock_of_the_chain_is_taken_over(run, queue, capsys):
    dead = ProcessId(host="n1", machine=this_process("n1").machine, pid=2**22 + 1, start="1")
    lock = FolderLock(run, name="chain.lock", process=dead, command="slurm")
    lock.acquire()
    lock._over.set()
    begins(run, queue, "100")
    assert "taking over the lock" in capsys.readouterr().err
    lock._lost = True


def test_a_command_waits_for_another_on_the_same_chain(run, queue, monkeypatch):
    lock = FolderLock(run, name="chain.lock", process=this_process("n1"), command="slurm")
    lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(chain_state, "LOCK_SECONDS", 0.0)
        with pytest.raises(
            ConfigError, match=r"Another command has been changing the chain.*is in use by process .* on n1"
        ):
            stop_chain(run)
    monkeypatch.setattr(chain_state.time, "sleep", lambda seconds: lock.release())
    stop_chain(run)
    assert read_chain(run).state == "stopped"


def test_a_script_that_ends_without_training_is_a_failure(run, queue):
    begins(run, queue, "100")
    outcome = end_job(run, Start("100"), 127).outcomes[-1]
    assert outcome.failed
    assert outcome.message == "the job script ended with exit code 127, and the training wrote no exit status"


def test_an_exit_status_without_a_job_counts_once(run, queue):
    """Under torchrun exit_status.json does not name the Slurm job."""

    def leave(time):
        status = ExitStatus(status="time_limit", message="", time=time, job="torchrun 7, started 1 on n1, restart 0")
        (run / "exit_status.json").write_bytes(status.encode())

    leave("2026-11-26T20:00:00")  # before the chain
    begins(run, queue, "100")
    assert end_job(run, Start("100"), 1).outcomes[-1].status == "killed"
    begins(run, queue, "101")
    leave("2026-11-26T21:00:00")
    assert end_job(run, Start("101")).outcomes[-1].status == "time_limit"
    begins(run, queue, "102")
    assert end_job(run, Start("102"), 127).outcomes[-1].status == "killed"


def test_a_job_that_slurm_stop_has_ended_is_judged(run, queue):
    begins(run, queue, "100")
    stop_chain(run)
    still = [slurm.QueuedJob("100", "COMPLETING")]
    assert settled_chain(run, still).outcomes == ()
    ends(run, "signal", job="100", saved=7)
    chain = settled_chain(run, [])
    assert [(past.start, past.status, past.iteration) for past in chain.outcomes] == [("100", "signal", 7)]
    assert chain == read_chain(run) == settled_chain(run, [])


@pytest.mark.parametrize(
    ("final", "state", "reason"),
    [("CANCELLED", "stopped", "job 101, which waited for the end of job 100, was cancelled"), (None, "active", "")],
)
def test_a_chain_whose_jobs_were_all_cancelled(run, queue, final, state, reason):
    begins(run, queue, "100")
    assert settled_chain(run, [slurm.QueuedJob("101", "PENDING")]).outcomes == (), "its successor judges it"
    queue.final["101"] = final
    ends(run, "signal", job="100", saved=7)
    chain = settled_chain(run, [])
    assert (chain.state, chain.reason, chain.outcomes[-1].status) == (state, reason, "signal")
