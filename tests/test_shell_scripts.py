"""Tests of all shell scripts of the repository: syntax, shellcheck, and the plan of the job scripts in slurm/."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_lite
from megatron_lite.cli.main import main

ROOT = Path(megatron_lite.__file__).parent.parent
SCRIPTS = sorted(
    [*ROOT.glob("slurm/*.slurm"), *ROOT.glob("slurm/*.sh"), *ROOT.glob("examples/**/*.sh"), ROOT / ".ci/run"]
)
JOBS = sorted(ROOT.glob("slurm/*.slurm"))


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Copy the job scripts to a folder without data, on a machine on which Slurm does not answer."""
    shutil.copytree(ROOT / "slurm", tmp_path / "clone" / "slurm")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sinfo").write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    (tmp_path / "bin" / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name in ("SCRATCH", "DATA", "RUNS", "CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "clone")
    return tmp_path / "clone"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_pass_bash_and_shellcheck(path):
    checker = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n", path], [checker, "--external-sources", path]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_plan_of_each_job_is_printed_in_a_fresh_clone(path, clone, capfd):
    assert main(["slurm", "submit", "--dry-run", f"slurm/{path.name}"]) == 0
    printed = capfd.readouterr()
    assert "Not submitted (--dry-run): no problem was found" in printed.out and not printed.err
    assert not list(clone.glob("[!s]*")), "nothing was written"


def test_the_plan_of_the_13b_job(clone, capfd):
    assert main(["slurm", "submit", "--dry-run", "slurm/tr1-13b.slurm"]) == 0
    out = re.sub(r" +", " ", capfd.readouterr().out)
    assert "64 nodes x 4 GPUs = 256 GPUs" in out and "256 = tensor 2 x pipeline 4 x data 32" in out
    assert "311,541 iterations of batch 16 to 1,024" in out and "12,853,386,240 parameters" in out
    assert "every 10 to iteration 100, every 18 to iteration 1,000, every 1,500 to iteration 311,541" in out
    assert "saves and stops after 19:44:20; 00:15:10 for a save (assumed for 168 GiB" in out
    options = "--nodes=32 --gpus-per-node=8 --ntasks-per-node=8"
    assert main(["slurm", "submit", "--dry-run", f"--sbatch={options}", "slurm/tr1-13b.slurm"]) == 0
    assert "32 nodes x 8 GPUs = 256 GPUs" in capfd.readouterr().out


def test_a_layout_that_the_nodes_do_not_fit_is_refused(clone, capfd):
    assert main(["slurm", "submit", "--dry-run", "--sbatch=--nodes=1", "slurm/tr1-13b.slurm"]) == 1
    error = capfd.readouterr().err
    assert "--tensor-model-parallel-size 2" in error and "--pipeline-model-parallel-size 4" in error


def test_the_site_settings_are_the_only_place_to_edit(clone, capfd):
    settings = clone / "slurm" / "env.sh"
    text = settings.read_text(encoding="utf-8").replace(
        "#export SBATCH_ACCOUNT=project@gpu", "export SBATCH_ACCOUNT=p7"
    )
    settings.write_text(text.replace("#export SBATCH_PARTITION=gpu", "export SBATCH_PARTITION=big"), encoding="utf-8")
    for path in JOBS:
        assert "#SBATCH --account" not in path.read_text(encoding="utf-8")
        assert main(["slurm", "submit", "--dry-run", f"slurm/{path.name}"]) == 0
        assert "account p7" in capfd.readouterr().out


@pytest.fixture
def run_job(clone):
    """Run a job script in bash; programs of the job only record their arguments. Return them and the result."""
    for name in ("srun", "sbatch", "megatron-lite", "hf"):
        path = clone.parent / "bin" / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> "{clone.parent}/calls"; echo 77\n', encoding="utf-8")
        path.chmod(0o755)

    def run_job(name, *arguments, **variables):
        defaults = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin"}
        (clone.parent / "calls").write_text("", encoding="utf-8")
        done = subprocess.run(
            ["bash", f"slurm/{name}.slurm", *arguments],
            **{"cwd": clone, "env": defaults | variables, "capture_output": True, "encoding": "utf-8", "check": False},
        )
        return (clone.parent / "calls").read_text(encoding="utf-8").splitlines(), done

    return run_job


def test_each_array_task_tokenizes_its_share_and_the_first_submits_the_merge(clone, run_job):
    (clone / "data" / "raw").mkdir(parents=True)
    for number in range(5):
        (clone / "data" / "raw" / f"{number}.jsonl.gz").touch()
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_COUNT": "2"}
    (merge, first), done = run_job("preprocess", SLURM_ARRAY_TASK_ID="0", **array)
    assert done.returncode == 0, done.stderr
    assert "--array=0 " in merge and "--dependency=afterok:70 " in merge and merge.endswith("preprocess.slurm merge")
    assert re.findall(r"(\d)\.jsonl\.gz", first) == ["0", "2", "4"] and "corpus.parts/part-00000 " in first
    (second,), _ = run_job("preprocess", SLURM_ARRAY_TASK_ID="1", **array)
    assert re.findall(r"(\d)\.jsonl\.gz", second) == ["1", "3"] and "part-00001 " in second
    calls, _ = run_job("preprocess", SLURM_ARRAY_TASK_ID="0", SLURM_RESTART_COUNT="1", **array)
    assert len(calls) == 1, "a requeued task does not submit the merge again"
    (merged,), _ = run_job("preprocess", "merge", SLURM_ARRAY_TASK_ID="0", **array)
    assert merged.startswith("megatron-lite merge --input ") and merged.endswith("corpus_text_document --overwrite")


def test_preprocessing_without_input_ends_with_an_error(run_job):
    calls, done = run_job("preprocess", SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_COUNT="1", SLURM_ARRAY_JOB_ID="1")
    assert done.returncode == 1 and "no file matches" in done.stderr and not calls


def test_training_jobs_pass_the_arguments_that_the_plan_shows(clone, run_job, capfd):
    for name in ("train", "tr1-13b"):
        (call,), done = run_job(name)
        assert done.returncode == 0, done.stderr
        flags = call.partition("pretrain_gpt.py ")[2]
        assert main(["explain", *flags.split(), *([] if name == "train" else ["--world-size", "256"])]) == 0
        assert "iterations" in capfd.readouterr().out
    assert (clone / "runs" / "tr1-13b" / "ds_config.7.json").is_file()


def test_evaluation_and_export(clone, run_job):
    (clone / "runs" / "gpt-1.3b").mkdir(parents=True)
    (call,), done = run_job("evaluate", "5000")
    assert done.returncode == 0 and "--load-iteration 5000" in call and "--text" in call and "--data-path" not in call
    assert (clone / "runs" / "gpt-1.3b" / "evaluation.json").read_text(encoding="utf-8") == "77\n"
    (export,), done = run_job("export_and_push")
    assert "--evaluation " in export and "On a login node: bash slurm/export_and_push.slurm push" in done.stdout
    settings, script = clone / "slurm" / "env.sh", clone / "slurm" / "export_and_push.slurm"
    calls, done = run_job("export_and_push", "push")
    assert not calls and done.returncode == 1 and "REPOSITORY=USER/gpt-1.3b" in done.stderr
    text = settings.read_text(encoding="utf-8").replace("TRANSFER_PARTITION=\n", "TRANSFER_PARTITION=archive\n")
    settings.write_text(text, encoding="utf-8")
    calls, done = run_job("export_and_push")
    assert not calls and "is a placeholder" in done.stderr, "nothing is exported that could not be pushed"
    script.write_text(script.read_text(encoding="utf-8").replace("=USER/", "=ada/"), encoding="utf-8")
    (push,), _ = run_job("export_and_push", "push")
    assert push.startswith("hf upload ada/gpt-1.3b ")
    (_, later), _ = run_job("export_and_push")
    assert "--partition=archive" in later and later.endswith("export_and_push.slurm push")
