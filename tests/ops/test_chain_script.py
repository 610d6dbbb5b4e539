"""Tests of the batch script of a chain's jobs, run by bash with a stand-in for megatron_lite."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.ops.chain_script import EXIT_ENDED, SCRIPT_NAME, write_scripts

READY = "echo $$; while :; do sleep 0.05; done"
"""Prints the process id of the user's script, and waits."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts the batch script with a given user's script."""
    program = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(program))
    jobs = []

    def start(script, *arguments, begin_code=0):
        program.write_text(
            f'#!/bin/sh\necho "$4" >> {tmp_path}/calls\n[ "$4" != begin ] || exit {begin_code}\n', encoding="utf-8"
        )
        program.chmod(0o755)
        (tmp_path / "job.slurm").write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        write_scripts(tmp_path, tmp_path / "job.slurm", arguments)
        job = subprocess.Popen(
            ("bash", tmp_path / SCRIPT_NAME), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.stdout.close()
        job.wait(20)


def calls(tmp_path):
    return (tmp_path / "calls").read_text(encoding="utf-8").split()


def test_the_script_passes_shellcheck(start, tmp_path):
    start("exit 0", "a b", "$HOME").wait(20)
    checker = Path(sys.prefix) / "bin" / "shellcheck"
    checked = subprocess.run((checker, tmp_path / SCRIPT_NAME), capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_job_ends_with_the_code_of_the_users_script(start, tmp_path):
    job = start('echo "$1"; exit 7', "a b")
    assert job.communicate(timeout=20)[0] == "a b\n" and job.returncode == 7
    assert calls(tmp_path) == ["begin", "end"]


def test_a_job_of_a_chain_that_has_ended_does_not_train(start, tmp_path):
    job = start("echo trained", begin_code=EXIT_ENDED)
    assert job.communicate(timeout=20)[0] == "" and job.returncode == 0
    assert calls(tmp_path) == ["begin"]


def test_a_job_that_cannot_begin_fails(start, tmp_path):
    job = start("echo trained", begin_code=1)
    assert job.communicate(timeout=20)[0] == "" and job.returncode == 1


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_a_signal_to_the_batch_shell_reaches_the_script(start, tmp_path, name):
    job = start(f"trap 'echo saved; exit 0' {name}; {READY}")
    job.stdout.readline()
    job.send_signal(getattr(signal, f"SIG{name}"))
    assert job.communicate(timeout=20)[0] == "saved\n" and job.returncode == 0
    assert calls(tmp_path) == ["begin", "end"]


def test_a_job_that_slurm_ends_is_left_to_its_successor(start, tmp_path):
    job = start(READY)
    script = int(job.stdout.readline())
    job.send_signal(signal.SIGTERM)
    assert job.poll() is None, "the script has its own signal, and time to save"
    os.kill(script, signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    assert calls(tmp_path) == ["begin"]
