"""Tests of a run's status: its job in every state, with recorded answers of Slurm, and its values."""

import os
import time

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.slurm import QueuedJob
from megatron_lite.ops.watch import RunWatch, rank_times
from megatron_lite.ops.watch_job import QUEUE_SECONDS, STATES, Queue, folder_user, run_comment
from megatron_lite.runs.exit_status import ExitStatus
from megatron_lite.runs.lock import HEARTBEAT_SECONDS
from megatron_lite.runs.lock_file import LOCK_NAME, Owner
from megatron_lite.runs.manifest import Manifest, Provenance, encode_manifest
from megatron_lite.runs.metrics_file import encode
from megatron_lite.runs.process import ProcessId, this_process

NOW = 1_800_000_000.0


@pytest.fixture
def cluster(monkeypatch):
    """Slurm's answers: jobs in the queue, and how others ended; a list of what was asked."""

    class Cluster:
        installed, queue, others, ends, asked = True, [], [], {}, []

        def queued_jobs(self, jobs=()):
            self.asked.append(tuple(jobs))
            if isinstance(self.queue, Exception):
                raise self.queue
            return [job for job in self.others if job.job in jobs] if jobs else self.queue

    made = Cluster()
    made.asked = []
    monkeypatch.setattr(slurm, "is_installed", lambda: made.installed)
    monkeypatch.setattr(slurm, "queued_jobs", made.queued_jobs)
    monkeypatch.setattr(slurm, "final_state", lambda job: made.ends.get(job))
    return made


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "run"
    made.mkdir()
    return made


def lock(folder, process, *, beat=NOW, command="train", since=NOW - 100):
    text = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(since))
    owner = Owner(token="ab", process=process, command=command, since=text, heartbeat_seconds=HEARTBEAT_SECONDS)
    (folder / LOCK_NAME).mkdir()
    (folder / LOCK_NAME / f"ab.{int(beat)}").write_bytes(owner.encode())


def elsewhere(job="4711"):
    return ProcessId(host="n1", machine="another", pid=7, slurm_job=job)


def ended(folder, status, **values):
    record = ExitStatus(status=status, message=f"it was {status}", time="2027-01-15T08:00:00+00:00", **values)
    (folder / "exit_status.json").write_bytes(record.encode())


def metrics(folder, *records):
    (folder / "metrics.jsonl").write_bytes(b"".join(encode(record) for record in records))


def start(**values):
    return {"kind": "start", "time": NOW - 90, "start_iteration": 0, "train_iterations": 100, "world_size": 4, **values}


def iteration(number, *, ago=10.0, loss=2.0, **values):
    return {
        "kind": "iteration",
        "time": NOW - ago,
        "iteration": number,
        "train_iterations": 100,
        "losses": {"lm loss": loss},
        "seconds": 2.0,
        "tokens_per_second": 500.0,
        "eta_seconds": 3600.0,
        **values,
    }


def observe(folder, queue=None, **values):
    return RunWatch(folder, queue or Queue(), clock=lambda: NOW, **values).observe()


def state(folder, **values):
    job = observe(folder, **values).job
    assert job.state in STATES
    return job.state


def test_a_job_on_another_machine_runs_while_its_heartbeat_is_recent(cluster, folder):
    lock(folder, elsewhere())
    cluster.queue = [QueuedJob("4711", "RUNNING")]
    assert state(folder) == "starting"
    metrics(folder, start(), iteration(7))
    cluster.queue = [
        QueuedJob("4711", "RUNNING", end=NOW + 60, nodes="n[1-2]"),
        QueuedJob("4712", "PENDING", "Dependency"),
    ]
    status = observe(folder, jobs=["4712"])
    assert (status.job.state, status.iteration, status.age, status.eta) == ("running", 7, 10.0, 3590.0)
    assert status.job.queued.nodes == "n[1-2]" and status.job.next.job == "4712"


def test_a_stale_lock_is_a_killed_job_and_slurm_says_why(cluster, folder):
    lock(folder, elsewhere(), beat=NOW - 1000)
    cluster.ends = {"4711": "NODE_FAIL"}
    job = observe(folder).job
    assert (
        job.state == "killed"
        and "process 7 on n1" in job.reason
        and "Slurm says NODE_FAIL" in job.reason
        and job.wanted
    )


def test_an_exit_status_and_slurm_outweigh_a_recent_heartbeat(cluster, folder, monkeypatch):
    lock(folder, elsewhere())
    metrics(folder, start(), iteration(7))
    cluster.queue = [QueuedJob("4711", "RUNNING")]
    record = ExitStatus(status="error", message="a rank was killed", time="2027-01-15T07:00:00+00:00")
    (folder / "exit_status.json").write_bytes(record.encode())
    assert (state(folder), folder_user(folder, Queue(), NOW) is None) == ("running", False), "of an earlier job"
    ended(folder, "error")
    cluster.queue = [QueuedJob("12", "PENDING", "Dependency", comment=run_comment(folder))]
    job = observe(folder).job
    assert job.state == "waiting" and "the last job: error" in job.reason and job.next is None
    assert folder_user(folder, Queue(), NOW) is None
    cluster.queue = [QueuedJob("4711", "COMPLETING"), *cluster.queue]
    job = observe(folder).job
    assert (job.state, job.next.job) == ("starting", "12") and "the last job: error" in job.reason
    cluster.queue = cluster.queue[1:]
    (folder / "exit_status.json").unlink()
    assert (state(folder), folder_user(folder, Queue(), NOW)) == ("waiting", None), "squeue does not list its job"
    cluster.queue = [QueuedJob("8_2", "RUNNING", number="4711")]
    assert state(folder) == "running", "an array task is listed with the array's number"
    cluster.queue = []
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert state(folder) == "running", "Slurm may hide other users' jobs"
    cluster.ends = {"4711": "RUNNING"}
    assert state(folder) == "running"
    cluster.ends = {"4711": "CANCELLED"}
    assert state(folder) == "killed"
    monkeypatch.undo()
    monkeypatch.setattr(slurm, "is_installed", lambda: False)
    assert state(folder) == "running" and folder_user(folder, Queue(), NOW) is not None


def test_a_task_of_an_array_does_not_hide_an_earlier_run(cluster, folder):
    cluster.queue = [
        QueuedJob("4_1", "RUNNING", comment=run_comment(folder), number="5"),
        QueuedJob("4_[2-3]", "PENDING", "Resources", comment=run_comment(folder), number="4"),
    ]
    assert state(folder) == "starting", "no task has trained yet"
    ended(folder, "error", job="Slurm step 4.0, restart 0.0")
    assert state(folder) == state(folder, jobs=["4_1"]) == "stopped"
    assert state(folder.parent / "none", jobs=["4_1"]) == "starting"
    ended(folder, "time_limit", job="Slurm step 3.0, restart 0.0")
    assert state(folder) == "starting", "the array may continue the run"
    (folder / "completed_iteration.txt").write_text("100\n")
    assert state(folder) == "completed"
    (folder / "completed_iteration.txt").unlink()
    ended(folder, "error", job="Slurm step 5.0, restart 0.0")
    assert state(folder) == "starting", "the task itself"
    (folder / "exit_status.json").unlink()
    metrics(folder, start(), iteration(7))
    assert state(folder) == "killed"
    lock(folder, elsewhere("4"))
    cluster.ends = {"4": "FAILED"}
    assert state(folder) == "killed"


def test_a_process_of_this_machine_counts_itself(cluster, folder):
    lock(folder, this_process("here"), beat=NOW - 1000)
    assert state(folder) == "starting", "the heartbeat may be late while the process runs"
    (folder / LOCK_NAME / f"ab.{int(NOW - 1000)}").unlink()
    (folder / LOCK_NAME).rmdir()
    ended_process = os.fork()
    if not ended_process:
        os._exit(0)
    os.waitpid(ended_process, 0)
    lock(folder, ProcessId(host="here", machine=this_process("").machine, pid=ended_process, start="1"))
    assert state(folder) == "killed"


def test_another_command_holds_the_lock(cluster, folder):
    lock(folder, this_process("here"), command="rollback")
    assert state(folder) == "busy"


def test_jobs_in_the_queue(cluster, folder):
    ended(folder, "time_limit", job="Slurm step 4711.0, restart 0.0")
    assert state(folder) == "stopped"
    cluster.queue = [QueuedJob("4711", "PENDING", "Priority", start=NOW + 600), QueuedJob("9", "PENDING")]
    job = observe(folder).job
    assert (job.state, job.queued.start) == ("queued", NOW + 600) and "it was time_limit" in job.reason
    cluster.queue = [QueuedJob("4711", "PENDING", "BeginTime")]
    assert state(folder) == "waiting"
    cluster.queue = [QueuedJob("4711", "COMPLETING")]
    assert state(folder) == "starting"


def test_jobs_are_found_by_comment_chain_and_number(cluster, folder):
    cluster.queue = [QueuedJob("1", "PENDING", "Priority", comment=run_comment(folder))]
    assert state(folder) == "queued"
    cluster.queue = [QueuedJob("1", "PENDING", "Priority", comment=run_comment(folder.parent))]
    assert state(folder) == "empty"
    assert state(folder, jobs=["1"]) == "queued"
    cluster.queue, cluster.others = [], [QueuedJob("2", "PENDING", "Dependency")]
    assert state(folder, jobs=["2"]) == "waiting"
    assert state(folder.parent / "none") == "missing"


def test_ends_of_a_run(cluster, folder):
    ended(folder, "error", host="n7", rank=3)
    job = observe(folder).job
    assert (job.state, job.reason, job.wanted) == ("stopped", "error on n7, rank 3: it was error", True)
    for status in ("kill_switch", "exit_flag"):
        ended(folder, status)
        assert (observe(folder).job.state, observe(folder).job.wanted) == ("stopped", False)
    ended(folder, "completed")
    (folder / "completed_iteration.txt").write_text("100\n")
    job = observe(folder).job
    assert (job.state, job.reason, job.wanted) == ("completed", "complete at iteration 100", False)


def test_a_run_without_exit_status(cluster, folder):
    metrics(folder, start(), iteration(7))
    job = observe(folder).job
    assert job.state == "killed" and "without writing exit_status.json" in job.reason


def test_slurm_is_asked_rarely_and_may_not_answer(cluster, folder):
    now = 0.0
    queue = Queue(clock=lambda: now)
    ended(folder, "error")
    for _ in range(3):
        observe(folder, queue)
    assert cluster.asked == [()]
    now += QUEUE_SECONDS
    cluster.queue = ConfigError("squeue failed: Unable to contact slurm controller", fix="-")
    assert "Unable to contact" in observe(folder, queue).job.queue_problem
    now += QUEUE_SECONDS
    cluster.queue = ConfigError("squeue failed: fatal: Could not establish a configuration source", fix="-")
    assert observe(folder, queue).job.queue_problem == ""
    cluster.installed = False
    assert state(folder) == "stopped"


def test_values_of_a_run(cluster, folder):
    metrics(folder, start(), iteration(1, seconds=100.0), iteration(2), iteration(3, loss=float("nan")))
    (folder / "rollbacks.jsonl").write_text("{}\n{}\n")
    status = observe(folder)
    assert status.seconds_per_iteration == 2.0, "the first iteration is left out"
    assert (status.rollbacks, status.eta, status.train_iterations) == (2, None, 100)
    assert status.free > 0 and status.to_json()["loss"] == "NaN"
    assert status.to_json()["job"]["state"] == "killed"


def test_metrics_in_another_file(cluster, folder, tmp_path):
    metrics(folder, start(), iteration(7))
    (folder / "metrics.jsonl").rename(tmp_path / "elsewhere.jsonl")
    provenance = Provenance(config={"metrics": {"metrics_file": str(tmp_path / "elsewhere.jsonl")}})
    (folder / "iter_0000005").mkdir()
    (folder / "iter_0000005/manifest.json").write_bytes(encode_manifest(Manifest(5, {}, {}, {}, provenance, {})))
    assert observe(folder).iteration is None
    (folder / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert observe(folder).iteration == 7


def test_a_latest_file_without_its_checkpoint(cluster, folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("50\n")
    status = observe(folder)
    assert (status.checkpoint, status.checkpoint_age, status.checkpoint_size) == (50, None, None)


def test_ranks_are_compared_with_their_pipeline_stage():
    times = [
        [1.0, 1.0, 1.0, 9.0, 3.0, 3.0, 3.0, 3.0],
        [1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 0.0, 3.0],
        [1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0],
    ]
    found = rank_times(times, {"hosts": [f"n{rank}" for rank in range(8)], "config": {"parallel": {"pp": 2}}})
    assert [rank.ratio for rank in found] == [1, 1, 1, 2.0, 1, 1, 1, 1] and found[3].host == "n3"
    alone = rank_times([[1.0, 2.0, 3.0]], {"config": {"parallel": {"pp": 3}}})
    assert [rank.ratio for rank in alone] == [0.4, 1.0, 2.0]
    assert rank_times([], {}) == [] and rank_times([[0.0, 0.0]], {}) == []
