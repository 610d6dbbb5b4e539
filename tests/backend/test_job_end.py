"""Tests of the end of the Slurm job: variables, squeue's answers, changes of the time limit."""

import sys
import time

import pytest

from megatron_lite.backend import job_end
from megatron_lite.backend.job_end import JobEnd, find_job_end

NOW = int(time.time())
JOB = {"SLURM_JOB_ID": "7", "PATH": "/nowhere"}


def find(variables):
    return find_job_end(lambda text: None, variables)


@pytest.fixture
def squeue(tmp_path):
    """Return a function that installs a stub of squeue, and returns the variables of a job with it."""

    def install(code):
        path = tmp_path / "squeue"
        path.write_text(f"#!{sys.executable}\nimport os, sys, time\n{code}\n", encoding="utf-8")
        path.chmod(0o755)
        return {**JOB, "PATH": str(tmp_path)}

    return install


def test_outside_of_a_slurm_job_there_is_no_end():
    assert find({}) is None


def test_slurms_variable_is_read_first(squeue):
    variables = squeue("sys.exit('asked')")
    assert find({**variables, "SLURM_JOB_END_TIME": str(NOW + 600)}).end == NOW + 600


def test_squeue_is_asked_in_unix_time_and_without_the_users_options(squeue):
    check = "assert os.environ['SLURM_TIME_FORMAT'] == '%s' and 'SQUEUE_STATES' not in os.environ\n"
    check += "assert sys.argv[1:] == ['--noheader', '--jobs', '7', '--format', '%e']\n"
    # A heterogeneous job has a line for each component.
    variables = squeue(f"{check}print({NOW + 900}); print({NOW + 600})")
    assert find({**variables, "SQUEUE_STATES": "PENDING", "SLURM_TIME_FORMAT": "relative"}).end == NOW + 600


def test_one_job_of_an_array_is_asked_for(squeue):
    variables = squeue(f"assert sys.argv[3] == '5_2'; print({NOW + 600})")
    found = find({**variables, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"})
    assert (found.job, found.end) == ("5_2", NOW + 600)


@pytest.mark.parametrize("answer", ["print('N/A')", "print('NONE')", "sys.exit(1)", "time.sleep(60)"])
def test_an_unknown_end_is_none(answer, squeue, monkeypatch):
    monkeypatch.setattr(job_end, "ASK_TIMEOUT", 0.5)
    found = find(squeue(answer))
    assert (found.end, found.seconds_left(needed=100)) == (None, None)


def test_without_squeue_the_end_is_unknown():
    assert find(JOB).end is None


def test_a_job_without_time_limit_ends_in_a_year_by_slurm():
    assert find({**JOB, "SLURM_JOB_END_TIME": str(NOW + 365 * 86400)}).end is None


def test_a_change_is_reported_once_and_a_failed_call_keeps_the_end():
    answers, lines = [NOW + 900, NOW + 900, None], []
    end = JobEnd("7", NOW + 600, ask=lambda: answers.pop(0), notify=lines.append)
    for _ in range(3):
        end.refresh()
    assert end.end == NOW + 900
    (line,) = lines
    assert line.startswith("Slurm job 7 now ends at ") and "(before: " in line


def test_a_thread_asks_again(monkeypatch):
    monkeypatch.setattr(job_end, "ASK_INTERVAL", 0.01)
    with JobEnd("7", None, ask=lambda: NOW + 60.0, notify=lambda text: None) as end:
        deadline = time.monotonic() + 30
        while end.end is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert end.end == NOW + 60
