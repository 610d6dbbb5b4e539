"""Tests of the hourly job scripts (watchdog, hub_sync) with stand-ins for Slurm's programs and a queue in a file."""

import shutil
import subprocess
from pathlib import Path

import pytest

import megatron_lite

ROOT = Path(megatron_lite.__file__).parent.parent
PROGRAMS = {
    # One line a job: its state and the arguments of sbatch.
    "sbatch": 'echo "PENDING $*" >> "$QUEUE"; echo "$(wc -l < "$QUEUE")"',
    "squeue": 'case "$*" in *--states=PENDING*) state=PENDING ;; *) state=. ;; esac; grep "$state" "$QUEUE"; true',
    "scancel": 'grep -v PENDING "$QUEUE" > "$QUEUE.new"; mv "$QUEUE.new" "$QUEUE"; echo "$*" >> "$QUEUE.cancelled"',
    "megatron-lite": 'echo "$*" >> "$QUEUE.work"; exit "${CODE:-0}"',
}


@pytest.fixture
def hourly(tmp_path):
    """Run one of the scripts in a clone; `job`: as its Slurm job does."""
    shutil.copytree(ROOT / "slurm", tmp_path / "clone" / "slurm")
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "queue").touch()
    (tmp_path / "run").mkdir()

    def run(script, *arguments, job=False, code=0, folder="run"):
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "QUEUE": str(tmp_path / "queue"), "CODE": str(code)}
        if job:
            environment["SLURM_JOB_ID"] = "7"
        return subprocess.run(
            ["bash", f"slurm/{script}.slurm", str(tmp_path / folder), *arguments],
            cwd=tmp_path / "clone",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    run.folder = tmp_path
    return run


def lines(path):
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.parametrize(("script", "arguments"), [("watchdog", ()), ("hub_sync", ("ada/gpt",))])
def test_one_job_an_hour_until_the_run_is_complete(hourly, script, arguments):
    folder = hourly.folder
    name = f"{script.replace('_', '-')}{str(folder / 'run').replace('/', '-')}"
    first = hourly(script, *arguments)
    assert f"scancel --name={name}" in first.stdout and first.returncode == 0
    assert "is in the queue already" in hourly(script, *arguments).stdout
    words = f"--parsable --job-name={name} --dependency=singleton"
    called = " ".join([f"slurm/{script}.slurm", str(folder / "run"), *arguments])
    assert lines(folder / "queue") == [f"PENDING {words} {called}"]

    for _ in range(2):  # the second one, as after two submissions, finds that a successor waits
        (folder / "queue").write_text((folder / "queue").read_text().replace(f"PENDING {words} {called}", "RUNNING"))
        assert hourly(script, *arguments, job=True).returncode == 0
    assert lines(folder / "queue") == ["RUNNING", f"PENDING {words} --begin=now+1hour {called}"]

    (folder / "run" / "completed_iteration.txt").write_text("9\n")
    last = hourly(script, *arguments, job=True)
    assert "is complete" in last.stdout and lines(folder / "queue") == ["RUNNING"]
    assert (
        len([line for line in lines(folder / "queue.work") if "--dry-run" not in line]) == 3
        and f"--name={name} --state=PENDING" in lines(folder / "queue.cancelled")[0]
    )


def test_failures_do_not_end_the_watchdog(hourly):
    assert hourly("watchdog", job=True, code=3).returncode == 0, "an alert is no failure of the job"
    assert hourly("watchdog", job=True, code=1).returncode == 1
    assert len(lines(hourly.folder / "queue")) == 1


def test_the_last_copy_is_repeated_until_it_succeeds(hourly):
    (hourly.folder / "run" / "completed_iteration.txt").write_text("9\n")
    assert hourly("hub_sync", "ada/gpt", job=True, code=1).returncode == 1
    assert len(lines(hourly.folder / "queue")) == 1
    assert hourly("hub_sync", "ada/gpt", job=True).returncode == 0 and lines(hourly.folder / "queue") == []


@pytest.mark.parametrize("job", [False, True])
@pytest.mark.parametrize(("script", "arguments"), [("watchdog", ()), ("hub_sync", ("ada/gpt",))])
def test_a_run_folder_that_does_not_exist(hourly, script, arguments, job):
    done = hourly(script, *arguments, job=job, folder="none")
    assert done.returncode == 1 and f"the run folder {hourly.folder / 'none'} does not exist" in done.stderr
    assert f"bash slurm/{script}.slurm RUN" in done.stderr
    assert not lines(hourly.folder / "queue") and not lines(hourly.folder / "queue.work")


@pytest.mark.parametrize("job", [False, True])
def test_the_placeholder_of_the_repository(hourly, job):
    for arguments in ((), ("USER/mine",), ("hf:USER/mine",)):
        done = hourly("hub_sync", *arguments, job=job)
        assert done.returncode == 1 and "is a placeholder" in done.stderr
    assert "NAME/mine" in done.stderr and not lines(hourly.folder / "queue")


def test_a_copy_that_cannot_succeed_is_not_submitted(hourly):
    assert hourly("hub_sync", "ada/gpt", code=1).returncode == 1
    (work,) = lines(hourly.folder / "queue.work")
    assert "--to ada/gpt" in work and "--dry-run" in work and not lines(hourly.folder / "queue")
