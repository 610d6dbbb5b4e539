"""Scripts of examples/, as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run_script(name, folder):
    """Run a script of examples/ offline, on one thread; return its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "ITERATIONS": "4", "MEGABYTES": "0.2"}
    ended = subprocess.run(
        ["bash", ROOT / "examples" / name, folder],
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.timeout(900)
def test_finetuning_of_a_hugging_face_model(tmp_path):
    output = run_script("finetune_from_hf.sh", tmp_path / "out")
    assert output.count("logits equal to transformers'") == 2
    assert "LlamaForCausalLM" in output
    assert "0 of 15 common tensors are equal bit for bit" in output
    assert "would push to your-name/your-model, revision main" in output
    assert (tmp_path / "out" / "exported" / "README.md").is_file()


@pytest.mark.timeout(900)
def test_algpt2(tmp_path):
    output = run_script("algpt2/train.sh", tmp_path / "out")
    assert "6 layers (one set of parameters), hidden size 96 (embedding 24)" in output
    assert "perplexity" in output
    assert output.count("logits equal to transformers'") == 1
    card = (tmp_path / "out" / "exported" / "README.md").read_text(encoding="utf-8")
    assert "`trust_remote_code=True`, which executes modeling_algpt2.py" in card


@pytest.mark.timeout(900)
def test_finetuning_with_control_codes(tmp_path):
    output = run_script("finetune_control_codes/run.sh", tmp_path / "out")
    for code in ("<|wikitext|>", "<|imdb|>", "<|pg19|>", "<|writingprompts|>", "average"):
        assert f"validation-{code} loss at iteration 20" in output
    assert "3 epochs of" in output and "frozen" in output
    assert f"b lowest validation loss (loaded by --load {tmp_path}/out/run/best" in output.replace("\n", "")
