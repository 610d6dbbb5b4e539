"""Tests of the checks before a job is queued, each with a job that fails it."""

import os
import shlex

import pytest

from megatron_lite.ops import submission as module
from megatron_lite.ops.job import read_job
from megatron_lite.ops.submission import check_job
from megatron_lite.runs.metrics_file import encode

HEADER = "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --time=1:00:00 --signal=USR1@300\n"
FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 100 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 100 --save-interval 20"
)


@pytest.fixture
def check(tmp_path):
    def check(more="", header=HEADER, flags=FLAGS, save="run", step_seconds=None):
        path = tmp_path / "job.slurm"
        saved = f"--save {shlex.quote(str(tmp_path / save))}" if save else ""
        path.write_text(f"{header}srun python pretrain_gpt.py {flags} {saved} {more}\n", encoding="utf-8")
        return check_job(read_job(path, environment={}), step_seconds=step_seconds)

    return check


def texts(submission):
    return [str(problem) for problem in submission.problems]


def test_a_job_without_a_fault(check):
    found = check("--tensor-model-parallel-size 2")
    assert texts(found) == [] == found.warnings
    assert found.parsed.config.parallel.world_size == 4 and found.parsed.config.parallel.dp == 2
    assert dict(found.facts)["Allocation"] == "4 GPUs on 2 nodes, 4 ranks"


def test_all_wrong_flags_and_missing_files_are_named(check):
    found = check(
        "--tensor-model-parallel-size 3 --clip-grad minus --frobnicate 1", flags=FLAGS.replace("--mock-data", "")
    )
    assert len(found.problems) >= 2 and any("--frobnicate" in text for text in texts(found))
    found = check("--data-path /nowhere/data", flags=FLAGS.replace("--mock-data", ""))
    assert any("/nowhere/data" in text for text in texts(found))


def test_a_layout_that_does_not_fit_the_allocation(check):
    assert any(
        "--tensor-model-parallel-size 3" in text and "4" in text
        for text in texts(check("--tensor-model-parallel-size 3"))
    )
    header = HEADER.replace("--gpus-per-node=2", "--gpus-per-node=1")
    (problem,) = texts(check(header=header))
    assert "starts 4 ranks, but the job has 2 GPUs (2 nodes with 1 GPU each)" in problem
    found = check(header=HEADER.replace("--gpus-per-node=2", "--gpus-per-node=4"))
    assert found.problems == [] and "4 of the job's 8 GPUs are not used" in found.warnings


def test_a_time_limit_that_ends_before_the_run_can_save(check, tmp_path):
    (problem,) = texts(check("--exit-duration-in-mins 60"))
    assert "--exit-duration-in-mins 60 is not below the time limit of 60 minutes" in problem
    header = HEADER.replace(" --signal=USR1@300", "")
    assert any("nothing stops the run" in warning for warning in check(header=header).warnings)
    (problem,) = texts(check(header=header, step_seconds=400.0))
    assert "about 9 iterations of 400 s fit into 01:00:00 (--time), and --save-interval is 20" in problem
    assert texts(check(step_seconds=400.0)) == [], "the signal makes it save"
    (tmp_path / "run").mkdir()
    lines = [encode({"kind": "iteration", "iteration": i, "seconds_per_iteration": 400.0}) for i in range(3)]
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(lines))
    assert "first save" in texts(check(header=header))[0], "the time was measured by the run"


def test_a_folder_that_is_full_or_complete(check, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    found = check()
    assert not found.problems and "5 checkpoints take" in found.warnings[0] and "--keep-last N" in found.warnings[0]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    assert "A checkpoint takes" in texts(check())[0]
    monkeypatch.undo()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "completed_iteration.txt").write_text("100\n")
    assert "is complete: it reached iteration 100" in texts(check())[0]
    assert any("there is no --save" in warning for warning in check(save="").warnings)


def test_a_folder_that_cannot_be_written(check, tmp_path, monkeypatch):
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and may(path, mode))
    assert f"cannot be written: no permission for {tmp_path}" in texts(check())[0]


def test_a_partition_that_the_cluster_does_not_have(check, tmp_path, monkeypatch):
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.parent.mkdir()
    sinfo.write_text("#!/bin/sh\nprintf 'long\\nshort\\n'\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sinfo.parent}:{os.environ['PATH']}")
    header = HEADER.replace("--time", "--partition=gpu,long --time")
    assert (
        "The cluster has no partition gpu (--partition gpu,long). Give one of long, short"
        in texts(check(header=header))[0]
    )


def test_variables_without_a_value_are_named(check):
    assert "not set, so that nothing stands in their place: $ROOT" in check("--tensorboard-dir x$ROOT").warnings


def test_files_that_the_script_writes_are_read(check):
    header = HEADER + 'cat <<EOT > ds.json\n{"train_micro_batch_size_per_gpu": 7}\nEOT\n'
    assert any("7" in text for text in texts(check("--deepspeed --deepspeed_config ds.json", header=header)))
