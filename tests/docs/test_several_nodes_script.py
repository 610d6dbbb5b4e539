"""Tests of the batch script in docs/several_nodes.md, with stubs for Slurm's commands and for training."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import megatron_lite

PAGE = (Path(megatron_lite.__file__).parent.parent / "docs" / "several_nodes.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.S)[1]


@pytest.mark.parametrize(
    ("status", "requeued"),
    [
        ("signal", True),
        ("time_limit", True),
        ("completed", False),
        ("error", False),
        ("kill_switch", False),
        (None, False),
    ],
)
def test_a_job_that_stopped_early_is_requeued(status, requeued, tmp_path):
    shared = tmp_path / "shared"
    activate = shared / "megatron_lite" / ".venv" / "bin" / "activate"
    for folder in (activate.parent, shared / "runs" / "gpt", tmp_path / "bin"):
        folder.mkdir(parents=True)
    activate.touch()
    ended = f"""echo '{{"status": "{status}"}}' > {shared}/runs/gpt/exit_status.json""" if status else "exit 137"
    for name, text in (
        ("srun", f'echo "$@" >> {tmp_path}/srun; {ended}'),
        ("scontrol", f'echo "$@" > {tmp_path}/called'),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.sbatch").write_text(SCRIPT.replace("/SHARED", str(shared)), encoding="utf-8")
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "8",
    }
    result = subprocess.run(
        ["bash", tmp_path / "train.sbatch"], env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    assert (tmp_path / "called").exists() == requeued, result
    if requeued:
        assert (tmp_path / "called").read_text(encoding="utf-8").strip() == "requeue 7"
    else:
        assert f"the run ended: {status or 'killed'}" in result.stdout
    assert f"--save {shared}/runs/gpt --load {shared}/runs/gpt" in (tmp_path / "srun").read_text(encoding="utf-8")
