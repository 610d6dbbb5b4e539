"""import, export, inspect and diff from the command line, in processes of their own where that is the point."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from support.interop_models import MODELS
from support.trainer import command

from megatron_lite.interop import transformers_logits, verify


@pytest.fixture
def apart(monkeypatch):
    """The comparison as users have it: in a process of its own."""
    monkeypatch.setattr(verify, "run_apart", RUN_APART)


RUN_APART = verify.run_apart


@pytest.mark.slow
def test_a_trained_model_to_hugging_face_and_back(corpus, tmp_path, apart, transformers, in_process, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    trained = command(*corpus.job("--save", run, "--train-iters", 4, "--save-interval", 2, "--eval-interval", 2))
    assert trained.code == 0
    evaluation = tmp_path / "evaluation.json"
    (tmp_path / "text").write_text("abcd efgh " * 20, encoding="utf-8")
    evaluation.write_text(
        command("evaluate", "--load", run, "--text", tmp_path / "text", "--json").out, encoding="utf-8"
    )
    exported = command("export", run, "--output", out, "--evaluation", evaluation)
    assert exported.code == 0, exported.err
    assert "GPT2LMHeadModel" in exported.out
    assert f"16 tokens of {corpus.data[0]}" in exported.out  # real text of the run
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(out))
    assert tokenizer.eos_token == "<|endoftext|>"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 300  # no padding
    assert (config["eos_token_id"], config["bos_token_id"]) == (299, 299)
    assert json.loads((out / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 299
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (
        "11,648 parameters",
        "| one_text_document | by size | 120 documents,",
        "data source 1",
        "0.001 to 0, linear",
        "![loss curve](loss.svg)",
        "| validation | ",
        "| text (window 16) | bits per byte | ",
        "pretrain_gpt.py --save-interval 2",
        "license: fill in",
        "Checked at export: logits equal",
    ):
        assert text in card, text
    assert str(tmp_path.parent) not in card  # where files lie is nobody's business
    assert (out / "loss.svg").read_text(encoding="utf-8").startswith("<svg")
    monkeypatch.setattr(verify, "run_apart", in_process)
    imported = command("import", out, "--output", tmp_path / "back")
    assert imported.code == 0, imported.err
    assert "built-in text" in imported.out
    assert "--num-layers 2" in imported.out
    assert "--pad-vocab-size-to" not in imported.out
    again = command("export", tmp_path / "back", "--output", tmp_path / "again", "--no-verify", "--no-card")
    assert again.code == 0, again.err
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "SentencePieceTokenizer"])
def test_other_tokenizers(kind, corpus, make_checkpoint, tmp_path):
    pytest.importorskip("sentencepiece")
    load = make_checkpoint(vocab_size=300, padded_vocab_size=384)
    words = ("--tokenizer-type", kind, "--vocab-file", corpus.tokenizer / "vocab.json")
    words = (*words, "--merge-file", corpus.tokenizer / "merges.txt")
    if kind == "SentencePieceTokenizer":
        made = command(
            *("train-tokenizer", "--input", corpus.text, "--output", tmp_path / "spm", "--vocab-size", 290),
            *("--tokenizer-type", kind, "--sentencepiece-model", "bpe"),
        )
        assert made.code == 0, made.err
        words = ("--tokenizer-type", kind, "--tokenizer-model", next((tmp_path / "spm").glob("*.model")))
    result = command("export", load, "--output", tmp_path / "out", *words)
    if result.code:  # a vocabulary that transformers cuts differently is refused, not published
        assert kind == "SentencePieceTokenizer"
        assert "gives other tokens in transformers" in result.err
        assert not (tmp_path / "out").exists()
        assert command("export", load, "--output", tmp_path / "out", *words, "--no-tokenizer").code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("tokenizer.json" in names) == (kind == "GPT2BPETokenizer")


def test_a_tokenizer_larger_than_the_vocabulary(corpus, make_checkpoint, tmp_path):
    words = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", corpus.tokenizer)
    result = command("export", make_checkpoint(), "--output", tmp_path / "out", *words)
    assert result.code == 1
    assert "The tokenizer has 300 tokens" in result.err


def test_inspect_and_diff_across_kinds(make_checkpoint, tmp_path):
    load = make_checkpoint(**MODELS["qwen2"][1])
    assert command("export", load, "--output", tmp_path / "out", "--no-verify").code == 0
    shown = command("checkpoint", "inspect", tmp_path / "out", "--tensors", "--config")
    assert shown.code == 0
    for text in ("a Hugging Face model", "Qwen2ForCausalLM", "float32", "can be imported", "yes"):
        assert text in shown.out
    assert "model.layers.0.self_attn.q_proj.weight" in shown.out
    assert '"num_key_value_heads": 2' in shown.out
    same = command("checkpoint", "diff", load, tmp_path / "out", "--values")
    assert "are equal bit for bit" in same.out
    # Settings of training that no config.json has.
    assert same.code == 1
    assert "model.hidden_dropout" in same.out
    assert "tensors" not in same.out.replace("common tensors", "")
    assert command("import", tmp_path / "out", "--output", tmp_path / "back", "--no-verify").code == 0
    equal = command("checkpoint", "diff", tmp_path / "out", tmp_path / "back", "--values")
    assert equal.code == 0, equal.out
    assert "same model and tensor shapes" in equal.out
    other = make_checkpoint("other", **{**MODELS["qwen2"][1], "init_std": 0.1})
    differs = command("checkpoint", "diff", tmp_path / "out", other, "--values")
    assert differs.code == 1
    assert "decoder.layers.3.self_attention.qkv.weight" in differs.out


def test_inspect_says_why_a_folder_cannot_be_imported(make_folder, small, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_folder("llama", num_key_value_heads=2, **small), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    shown = command("checkpoint", "inspect", folder)
    assert shown.code == 0
    assert "quantization_config" in shown.out


def test_wrong_words(tmp_path, make_folder, gpt2):
    assert command("import").code == 2
    assert command("import", tmp_path, "--output", tmp_path / "x", "--from", "onnx").code == 2
    assert command("import", tmp_path, "--output", tmp_path / "x", "--seq-length", 0).code == 2
    evaluation = tmp_path / "evaluation.json"
    for text in ("{}", "[", '{"results": [{}]}', '{"results": [3]}'):
        evaluation.write_text(text, encoding="utf-8")
        result = command("export", tmp_path, "--output", tmp_path / "x", "--evaluation", evaluation)
        assert "is not the output of `megatron-lite evaluate --json`" in result.err
    for name in ("import", "export"):
        shown = command(name, "--help")
        assert shown.code == 0
        assert "--no-verify" in shown.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_tokens", "text"),
    [(True, "transformers cannot load .*config.json"), (False, "files were deleted.*tokens.npy")],
)
def test_a_failed_comparison_is_explained_in_one_line(has_tokens, text, tmp_path, apart, transformers):
    request = tmp_path / "request"
    request.mkdir()
    if has_tokens:
        for name in ("tokens", "expected"):
            np.save(request / f"{name}.npy", np.zeros((1, 4), dtype=np.int64))
    with pytest.raises(verify.CheckpointError, match=text):
        verify.run_apart(tmp_path, request)


def test_what_the_process_compares(make_folder, small, tmp_path, transformers):
    """A folder whose weights are of another model is refused by name, not filled with random numbers."""
    folder = tmp_path / "model"
    shutil.copytree(make_folder("llama", num_key_value_heads=2, **small), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    _, problem = transformers_logits.load(folder)
    assert problem.startswith("missing keys: model.layers.2.")
    assert "does not load" in transformers_logits.compare_tokenizer(tmp_path / "nothing", "text", [1])
