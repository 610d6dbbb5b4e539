"""Tests of reading recorded output of Slurm's programs."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.slurm import QueuedJob, final_state, queued_jobs, read_queue, submit

SQUEUE = """\
4711|4711|RUNNING|None|2026-11-26T20:00:00|2026-11-27T16:00:00|n[01-32]|run:/scratch/tr1|tr1|13B
4712|4712|PENDING|Dependency|N/A|N/A||(null)|tr1
4713_4|4720|PENDING|Resources|2026-11-27T02:30:00|2026-11-27T04:30:00||(null)|shards
"""


RECORDED = Path(__file__).with_name("slurm_22_05")
"""Output of Slurm 22.05 on the cluster of tests/slurm/cluster.py."""


def fake(monkeypatch, outputs):
    """Answer calls from a table by program name: text, or an error to raise."""

    def call(*command, **options):
        answer = outputs.get(command[0], ConfigError(f"{command[0]} is not installed here", fix="-"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "call", call)


def seconds(text):
    return datetime.fromisoformat(text).timestamp()


def test_the_queue_is_read():
    first, second, third = read_queue(SQUEUE)
    assert first == QueuedJob(
        "4711",
        "RUNNING",
        "None",
        seconds("2026-11-26T20:00:00"),
        seconds("2026-11-27T16:00:00"),
        "n[01-32]",
        "run:/scratch/tr1",
        "tr1|13B",
        "4711",
    )
    assert (second.reason, second.start, second.comment) == ("Dependency", None, "")
    assert (third.job, third.start) == ("4713_4", seconds("2026-11-27T02:30:00"))
    assert third.is_array_task and third.is_one_of(["4720"]) and third.is_one_of(["4713_4"])
    assert not third.is_one_of(["4713"]) and not QueuedJob("8_[1-3]", "PENDING", number="8").is_one_of(["8"])


def test_a_job_that_has_left_the_queue_is_not_an_error(monkeypatch):
    fake(
        monkeypatch, {"squeue": ConfigError("squeue failed: slurm_load_jobs error: Invalid job id specified", fix="-")}
    )
    assert queued_jobs(["4711"]) == []
    fake(monkeypatch, {"squeue": ConfigError("squeue failed: Unable to contact slurm controller", fix="-")})
    with pytest.raises(ConfigError, match="Unable to contact"):
        queued_jobs(["4711"])


@pytest.mark.parametrize(
    ("outputs", "state"),
    [
        ({"sacct": "TIMEOUT\n"}, "TIMEOUT"),
        ({"sacct": "CANCELLED by 1000\n"}, "CANCELLED"),
        ({"sacct": "", "scontrol": "JobId=7 JobName=gpt UserId=u(1000) JobState=NODE_FAIL Reason=None"}, "NODE_FAIL"),
        (
            {
                "sacct": ConfigError("sacct failed: Slurm accounting storage is disabled", fix="-"),
                "scontrol": ConfigError("scontrol failed: Invalid job id specified", fix="-"),
            },
            None,
        ),
        ({}, None),
    ],
)
def test_the_final_state_of_a_job(monkeypatch, outputs, state):
    fake(monkeypatch, outputs)
    assert final_state("7") == state


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Return a function that installs an sbatch which prints the given lines to stderr, one for each call."""

    def install(*errors):
        (tmp_path / "errors").write_text("".join(f"{error}\n" for error in errors), encoding="utf-8")
        program = tmp_path / "sbatch"
        program.write_text(
            f"#!/bin/sh\nerror=$(head -n 1 {tmp_path}/errors)\nsed -i 1d {tmp_path}/errors\n"
            '[ -n "$error" ] || { echo "77;cluster"; exit 0; }\necho "$error" >&2; exit 1\n',
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm.time, "sleep", pauses.append)

    pauses = []
    install.pauses = pauses
    return install


@pytest.mark.parametrize(
    "error",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
    ],
)
def test_a_controller_that_does_not_answer_is_asked_again(sbatch, error):
    sbatch(error, error)
    assert submit([], "job.slurm") == "77"
    assert sbatch.pauses == [1.0, 2.0]
    sbatch(*[error] * 5)
    with pytest.raises(ConfigError, match=r"sbatch failed: .*Wait until the controller answers"):
        submit([], "job.slurm")
    assert sbatch.pauses[2:] == [1.0, 2.0, 4.0, 8.0]


def test_a_refusal_is_final(sbatch):
    sbatch("sbatch: error: Batch job submission failed: Invalid node name specified")
    with pytest.raises(ConfigError, match="Invalid node name specified"):
        submit([], "job.slurm")
    assert sbatch.pauses == []


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="squeue is not installed here"):
        queued_jobs(["1"])


def test_recorded_output_of_squeue():
    jobs = {job.name: job for job in read_queue((RECORDED / "squeue.txt").read_text(encoding="utf-8"))}
    assert {name: (job.state, job.reason) for name, job in jobs.items()} == {
        "running": ("RUNNING", "None"),
        "successor": ("PENDING", "Dependency"),
        "resources": ("PENDING", "Resources"),
        "held": ("PENDING", "JobHeldUser"),
        "delayed": ("PENDING", "BeginTime"),
        "toolarge": ("PENDING", "PartitionNodeLimit"),
        "shards": ("PENDING", "Priority"),
    }
    assert (jobs["running"].nodes, jobs["running"].comment) == ("n[1-2]", "run:/scratch/gpt")
    assert jobs["resources"].start == seconds("2026-11-27T00:13:06") and jobs["delayed"].end is None
    assert jobs["shards"].job == "8_[1-3%1]"


def test_recorded_output_of_scontrol(monkeypatch):
    disabled = ConfigError("sacct failed: Slurm accounting storage is disabled", fix="")
    fake(
        monkeypatch,
        {"sacct": disabled, "scontrol": (RECORDED / "scontrol_show_job.txt").read_text(encoding="utf-8")},
    )
    assert final_state("7") == "CANCELLED"


def test_all_lines_of_an_error_are_shown(tmp_path, monkeypatch):
    program = tmp_path / "sbatch"
    program.write_text(
        "#!/bin/sh\necho \"sbatch: unrecognized option '--bogus'\" >&2\necho 'Try --help' >&2\nexit 1\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        ConfigError, match=r"sbatch failed: unrecognized option '--bogus'; Try --help\. Correct what this names"
    ):
        slurm.submit(["--bogus"], "job.slurm")
