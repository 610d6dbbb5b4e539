"""Ranks on a real Slurm: a heterogeneous step whose tasks start two ranks each, and a signal to it."""

import sys
import time
from pathlib import Path

from megatron_lite.runs.exit_status import read_exit_status

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 120
SCRIPT = """#!/bin/bash
#SBATCH --job-name=launch --nodes=1 --ntasks=1 --nodelist=n2 --time=5 --output={folder}/job.out
#SBATCH hetjob
#SBATCH --nodes=1 --ntasks=1 --nodelist=n1

srun --het-group=0,1 {python} {root}/pretrain_gpt.py --ranks-per-task 2 --tensor-model-parallel-size 2 --device cpu \\
    --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 \\
    --micro-batch-size 1 --global-batch-size 4 --train-iters 1000000 --lr 1e-3 --log-interval 1 --eval-iters 0 \\
    --mock-data --tokenizer-type NullTokenizer --vocab-size 31 --save {folder}/run --save-interval 1000000
echo "srun ended with $?"
"""


def test_tasks_of_a_heterogeneous_step_start_their_ranks_and_forward_a_signal(cluster, tmp_path):
    """Rank 0 is on n2, the first component's node, although n1 comes first in the step's list of nodes."""
    script, output = tmp_path / "job.slurm", tmp_path / "job.out"
    script.write_text(SCRIPT.format(folder=tmp_path, python=sys.executable, root=ROOT), encoding="utf-8")
    job = cluster.run("sbatch", "--parsable", str(script)).strip()
    try:
        wait_for("iteration        2/", output)
        cluster.run("scancel", "--signal=USR1", job)
        wait_for("srun ended with", output)
    finally:
        cluster.run("scancel", job, check=False)
    text = output.read_text(encoding="utf-8")
    assert "[n2] starting 2 ranks: 0 to 1 of 4" in text and "[n1] starting 2 ranks: 2 to 3 of 4" in text
    assert f"because of Slurm job {job}, which ends at" in text
    assert "srun ended with 0" in text
    status = read_exit_status(tmp_path / "run")
    assert status.status == "signal" and status.saved_iteration == status.iteration
    assert status.job.startswith(f"Slurm step {job}.")


def wait_for(text, path):
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists() or text not in path.read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, path.read_text(encoding="utf-8") if path.exists() else "no output"
        time.sleep(0.2)
