"""Tests of `megatron-lite slurm submit`: what it prints, when it calls sbatch, and when it refuses to."""

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
