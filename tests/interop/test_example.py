"""Scripts of examples/, as they are, with their programs in this process."""

from types import SimpleNamespace

import pytest
from support.page_programs import FINDINGS, HERE, Programs
from support.page_shell import PageShell
from support.trainer import Result, command

pytestmark = pytest.mark.slow


class UnchangedPrograms(Programs):
    """Programs whose flags are not replaced by toy sizes."""

    def megatron_lite(self, args, stdin, launcher=None):
        """Run a command."""
        result = command(*args, *(HERE if args[0] == "train" else ()))
        return Result(0, result.out, result.err) if result.code == FINDINGS.get(" ".join(args[:2])) else result


def run_script(name, folder, monkeypatch):
    """Run a script of examples/ offline with the output folder "out"; return what it prints."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shell = PageShell(folder, None, UnchangedPrograms)
    try:
        line = f"ITERATIONS=4 MEGABYTES=0.2 bash examples/{name} out > printed"
        assert shell.run(SimpleNamespace(text=line, file="", made=())) == ""
    finally:
        shell.close()
    return (folder / "printed").read_text(encoding="utf-8")


def test_finetuning_of_a_hugging_face_model(tmp_path, monkeypatch):
    output = run_script("finetune_from_hf.sh", tmp_path, monkeypatch)
    assert output.count("logits equal to transformers'") == 2
    assert "LlamaForCausalLM" in output
    assert "0 of 15 common tensors are equal bit for bit" in output
    assert "would push to your-name/your-model, revision main" in output
    assert (tmp_path / "out" / "exported" / "README.md").is_file()


def test_algpt2(tmp_path, monkeypatch):
    output = run_script("algpt2/train.sh", tmp_path, monkeypatch)
    assert "6 layers (one set of parameters), hidden size 96 (embedding 24)" in output
    assert "perplexity" in output
    assert output.count("logits equal to transformers'") == 1
    card = (tmp_path / "out" / "exported" / "README.md").read_text(encoding="utf-8")
    assert "`trust_remote_code=True`, which executes modeling_algpt2.py" in card


def test_finetuning_with_control_codes(tmp_path, monkeypatch):
    output = run_script("finetune_control_codes/run.sh", tmp_path, monkeypatch)
    for code in ("<|wikitext|>", "<|imdb|>", "<|pg19|>", "<|writingprompts|>", "average"):
        assert f"validation-{code} loss at iteration 20" in output
    assert "3 epochs of" in output and "frozen" in output
    assert "b lowest validation loss (loaded by --load out/run/best" in output.replace("\n", "")
