"""Tests of watch and of the hourly job scripts on a real Slurm."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from slurm.conftest import ROOT

from megatron_lite.ops.watch_job import run_comment
from megatron_lite.runs.metrics_file import encode

WAIT_SECONDS = 60


@pytest.fixture
def clone(tmp_path):
    """The job scripts, with an environment in which `megatron-lite` is this program."""
    made = tmp_path / "clone"
    shutil.copytree(ROOT / "slurm", made / "slurm")
    (made / ".venv" / "bin").mkdir(parents=True)
    program = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}\n"
    (made / ".venv" / "bin" / "activate").write_text(program, encoding="utf-8")
    (made / "wait.sh").write_text("#!/bin/bash\nsleep 1\n", encoding="utf-8")
    return made


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose job was killed."""
    made = tmp_path / "run"
    made.mkdir()
    record = {"kind": "iteration", "time": time.time(), "iteration": 3, "losses": {"lm loss": 2.0}}
    (made / "metrics.jsonl").write_bytes(encode(record))
    return made


def until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def job_of(cluster, run):
    report = cluster.run(sys.executable, "-m", "megatron_lite", "watch", "--once", "--json", str(run), check=False)
    return json.loads(report)["runs"][0]["job"]


def test_a_queued_job_is_found_by_its_comment(cluster, clone, run):
    assert job_of(cluster, run)["state"] == "killed"
    options = ("--parsable", "--begin=now+1hour", f"--comment={run_comment(run)}")
    number = cluster.run("sbatch", *options, "wait.sh", cwd=clone).strip()
    job = job_of(cluster, run)
    assert (job["state"], job["queued"]["job"], job["queued"]["reason"]) == ("waiting", number, "BeginTime")
    assert abs(job["queued"]["start"] - time.time() - 3600) < 300
    cluster.run("scancel", number)
    until(lambda: job_of(cluster, run)["state"] == "killed")


@pytest.mark.parametrize(("script", "arguments"), [("watchdog", ()), ("hub_sync", ("./copy",))])
def test_an_hourly_job_submits_one_successor_and_ends_with_the_run(cluster, clone, run, script, arguments):
    command = ("bash", f"slurm/{script}.slurm", str(run), *arguments)
    name = cluster.run(*command, cwd=clone).strip().rpartition("--name=")[2]

    def queue():
        return cluster.run("squeue", "-h", "-n", name, "-o", "%i %T %r").splitlines()

    until(lambda: len(jobs := queue()) == 1 and jobs[0].endswith("PENDING BeginTime"))
    assert "is in the queue already" in cluster.run(*command, cwd=clone)
    (successor,) = queue()
    (run / "completed_iteration.txt").write_text("3\n", encoding="utf-8")
    cluster.run("scontrol", "update", f"JobId={successor.split()[0]}", "StartTime=now")
    until(lambda: not queue())
    printed = (clone / f"{name}.out").read_text(encoding="utf-8")
    assert "is complete" in printed and "WARNING" not in printed
    if script == "hub_sync":
        assert (clone / "copy" / "completed_iteration.txt").exists()
