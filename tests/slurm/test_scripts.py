"""The scripts of slurm/ on a real cluster, from the text to a complete run, and jobs that are refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 200
PROGRAM = "import sys; from megatron_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
SMALL = {
    "LAYERS=24": "LAYERS=2",
    "HIDDEN=2048": "HIDDEN=48",
    "HEADS=16": "HEADS=6",
    "SEQ_LENGTH=2048": "SEQ_LENGTH=32",
    "GLOBAL_BATCH=512": "GLOBAL_BATCH=16",
    "ITERATIONS=100_000": "ITERATIONS=20",
    "WARMUP=1000": "WARMUP=2",
    "SAVE_INTERVAL=1000": "SAVE_INTERVAL=10",
}
# The nodes of the test cluster have no GPUs.
TWO_NODES = "--nodes=2 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --hint=multithread"


@pytest.fixture(scope="module")
def site(cluster, dataset, tmp_path_factory):
    """A clone whose settings and variables are edited for the test cluster, with text and tokenizer."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    shutil.copy(ROOT / "pretrain_gpt.py", folder)
    made = Path(dataset.split("--tokenizer-model ")[1])
    shutil.copytree(made, folder / "data" / "tokenizer")
    (folder / "data" / "raw").mkdir()
    lines = (made.parent / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(3):
        part = folder / "data" / "raw" / f"{number}.jsonl"
        part.write_text("".join(lines[number::3]), encoding="utf-8")
    programs = folder / "programs"
    programs.mkdir()
    (programs / "megatron-lite").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM}" "$@"\n', encoding="utf-8")
    (programs / "megatron-lite").chmod(0o755)
    with (folder / "slurm" / "env.sh").open("a", encoding="utf-8") as settings:
        settings.write("export SBATCH_PARTITION=debug OMP_NUM_THREADS=1\n")
        settings.write(f"export PATH={programs}:{Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}\n")
    train = folder / "slurm" / "train.slurm"
    text = train.read_text(encoding="utf-8")
    for old, new in SMALL.items():
        assert old in text
        text = text.replace(old, new)
    train.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def submit(cluster, site):
    """Submit a script; return the exit code and the output."""

    def submit(*arguments):
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name in ("SCRATCH", "DATA", "RUNS"):
            environment.pop(name, None)
        command = [*cluster._entered("ctl"), sys.executable, "-c", PROGRAM, "slurm", "submit", *arguments]
        done = subprocess.run(command, env=environment, cwd=site, capture_output=True, encoding="utf-8", check=False)
        return done.returncode, done.stdout + done.stderr

    return submit


def wait(cluster, site, path):
    """Wait until the jobs of the scripts have ended and a file exists; return its text."""
    deadline = time.monotonic() + WAIT_SECONDS
    while cluster.run("squeue", "--noheader", "--name=preprocess,merge,train").strip():
        assert time.monotonic() < deadline, cluster.run("squeue")
        time.sleep(0.5)
    logs = "\n".join(log.read_text(encoding="utf-8")[-2000:] for log in site.glob("*.out"))
    assert (site / path).exists(), logs
    return (site / path).read_text(encoding="utf-8", errors="replace")


def test_from_the_text_to_a_complete_run(cluster, site, submit):
    code, out = submit("--sbatch=--array=0-1 --cpus-per-task=2", "slurm/preprocess.slurm")
    assert code == 0 and "Submitted batch job" in out, out
    wait(cluster, site, "data/corpus_text_document.idx")

    code, out = submit("--chain", f"--sbatch={TWO_NODES}", "slurm/train.slurm")
    assert code == 0 and "the first of a chain" in out, out
    status = json.loads(wait(cluster, site, "runs/gpt-1.3b/exit_status.json"))
    assert (status["status"], status["iteration"]) == ("completed", 20)
    code, out = submit("--chain", f"--sbatch={TWO_NODES}", "slurm/train.slurm")
    assert code == 1 and "is complete: it reached iteration 20" in out, out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--partition=fast", "The cluster has no partition fast (--partition fast). Give one of debug"),
        ("--nodes=9", "The job requests 9 nodes, and partition debug has 4"),
        ("--ntasks-per-node=9", "The command starts 9 ranks, but the job has 8 GPUs"),
    ],
)
def test_jobs_that_cannot_work_are_refused_before_the_queue(cluster, submit, options, problem):
    code, out = submit(f"--sbatch={options}", "slurm/train.slurm")
    assert code == 1 and problem in out, out
    assert not cluster.run("squeue", "--noheader", "--name=train").strip()


def test_sbatch_refuses_what_no_check_knows(submit, site):
    (site / "job.slurm").write_text("#!/bin/bash\nmegatron-lite merge\n", encoding="utf-8")
    code, out = submit("--sbatch=--constraint=unknown", "job.slurm")
    assert code == 1 and "Invalid feature specification" in out, out
