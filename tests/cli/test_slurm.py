"""Tests of `megatron-lite slurm submit`: what it prints, when it calls sbatch, and when it refuses to."""

import json
import os

import pytest

from megatron_lite.cli.main import main

JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --time=1:00:00 --signal=USR1@300
srun python pretrain_gpt.py --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 \\
    --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size ${1:-4} --train-iters 100 --lr 1e-3 \\
    --tokenizer-type NullTokenizer --vocab-size 100 --save run --save-interval 20 --mock-data \\
    --tensor-model-parallel-size 2
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.slurm").write_text(JOB, encoding="utf-8")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return "job.slurm"


@pytest.fixture
def sbatch(script, tmp_path):
    """Install an sbatch that writes down its arguments and fails as asked."""

    def install(code=0):
        program = tmp_path / "bin" / "sbatch"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\necho Submitted batch job 7\nexit {code}\n', encoding="utf-8"
        )
        program.chmod(0o755)

    return install


def test_a_dry_run_prints_the_plan_and_submits_nothing(script, sbatch, capfd, tmp_path):
    sbatch()
    assert main(["slurm", "submit", "--dry-run", script]) == 0
    out = capfd.readouterr().out
    assert "4 ranks = tensor 2 x pipeline 1 x data 2" in out
    assert "Allocation  4 GPUs on 2 nodes, 4 ranks" in out and "Time limit  01:00:00" in out
    assert out.rstrip().endswith("Not submitted (--dry-run): no problem was found")
    assert not (tmp_path / "calls").exists()


def test_a_job_is_submitted_with_its_options_and_arguments(script, sbatch, capfd, tmp_path):
    sbatch()
    assert main(["slurm", "submit", "--sbatch=--nodes=4 --time=2:00:00", script, "8"]) == 0
    assert "Submitted batch job 7" in capfd.readouterr().out
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "--nodes=4 --time=2:00:00 job.slurm 8\n"
    sbatch(code=3)
    assert main(["slurm", "submit", script]) == 3


def test_a_job_that_cannot_work_is_refused_with_all_reasons(script, sbatch, capfd, tmp_path):
    sbatch()
    assert main(["slurm", "submit", "--sbatch=--gpus-per-node=1", script, "4x"]) == 1
    printed = capfd.readouterr()
    assert "The command starts 4 ranks, but the job has 2 GPUs" in printed.err and "--global-batch-size" in printed.err
    assert not (tmp_path / "calls").exists()


def test_without_slurm_it_says_where_to_submit(script, capfd, monkeypatch):
    from megatron_lite.cli import slurm

    which = slurm.shutil.which
    monkeypatch.setattr(
        slurm.shutil, "which", lambda name, path=None: None if name == "sbatch" else which(name, path=path)
    )
    assert main(["slurm", "submit", script]) == 1
    assert "sbatch is not installed here" in capfd.readouterr().err


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A chain with two ended jobs; the queue of its jobs is set by the test."""
    from megatron_lite.ops import slurm
    from megatron_lite.ops.chain_script import write_scripts
    from megatron_lite.ops.chain_state import Chain, Outcome, Start, write_chain

    folder = tmp_path / "run"
    folder.mkdir()
    script = tmp_path / "job.slurm"
    script.write_text(JOB, encoding="utf-8")
    write_scripts(folder, script, [])
    outcomes = (
        Outcome("41", "time_limit", "exiting program after 60.0 minutes", 1200, "", "2026-11-26T20:00:00+00:00"),
        Outcome("41, restart 1", "error", "CUDA error on rank 3", 1200, "n7", "2026-11-26T21:00:00+00:00"),
    )
    chain = Chain(str(script), job=Start("42"), successor="43", outcomes=outcomes, excluded=("n7",))
    write_chain(folder, chain)
    queue = [
        slurm.QueuedJob("42", "RUNNING", "None", 1795734658.0, 1795738258.0, "n[1-2]"),
        slurm.QueuedJob("43", "PENDING", "Dependency"),
    ]
    monkeypatch.setattr(slurm, "queued_jobs", lambda jobs: [job for job in queue if job.job in jobs])
    return queue


def test_status_shows_ended_running_and_waiting_jobs(chain, capsys, tmp_path):
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [f"Chain of {tmp_path / 'run'}: active", "Excluded after failures: n7"]
    text = "\n".join(lines)
    assert "job state time saved host message" in text and "1,200" in text and "n[1-2]" in text
    assert "pending" in text and "no start estimate" in text and "running" in text

    chain[:] = [chain[1].__class__("43", "PENDING", "JobHeldUser", 1795734658.0)]
    (tmp_path / "job.slurm").write_text("#!/bin/bash\n", encoding="utf-8")
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "has changed since the chain began; its jobs run the copy" in text
    assert "starts about" in text and "scontrol release 43" in text


def test_status_as_json(chain, capsys, tmp_path):
    assert main(["slurm", "status", "--json", str(tmp_path / "run")]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["failures"], status["script_changed"]) == ("active", 1, False)
    assert [job["job"] for job in status["queue"]] == ["42", "43"] and status["outcomes"][1]["host"] == "n7"


def test_a_chain_without_a_job_in_the_queue_is_interrupted(chain, capsys, tmp_path):
    chain.clear()
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    assert "interrupted: none of its jobs is in the queue" in capsys.readouterr().out


def test_status_without_slurm_shows_the_ended_jobs(chain, capsys, tmp_path, monkeypatch):
    from megatron_lite.errors import ConfigError
    from megatron_lite.ops import slurm

    def refuse(jobs):
        raise ConfigError("squeue is not installed here", fix="")

    monkeypatch.setattr(slurm, "queued_jobs", refuse)
    assert main(["slurm", "status", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "active; job 42, job 43 waits for its end" in out and "The queue is unknown: squeue is not installed" in out
    assert "CUDA error" in out


def test_the_commands_of_a_job_are_refused_outside_of_one(chain, capsys, tmp_path):
    assert main(["slurm", "begin", str(tmp_path / "run")]) == 1
    assert "SLURM_JOB_ID is not set: this is not a Slurm job" in capsys.readouterr().err
