"""examples/finetune_from_hf.sh, as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_it_runs_offline(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "ITERATIONS": "4", "MEGABYTES": "0.2"}
    ended = subprocess.run(
        ["bash", ROOT / "examples" / "finetune_from_hf.sh", tmp_path / "out"],
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("logits equal to transformers'") == 2
    assert "LlamaForCausalLM" in ended.stdout
    assert "0 of 15 common tensors are equal bit for bit" in ended.stdout
    assert "would push to your-name/your-model, revision main" in ended.stdout
    assert (tmp_path / "out" / "exported" / "README.md").is_file()
