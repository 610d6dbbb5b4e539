"""import, export, checkpoint inspect and diff of Megatron-LM and DeepSpeed checkpoints, as typed."""

from __future__ import annotations

import pytest
from support.deepspeed_files import write_deepspeed, write_universal
from support.interop_models import VOCAB
from support.megatron_dist_files import write_torch_dist
from support.megatron_files import arguments, write_classic
from support.trainer import command


def succeeded(*words):
    result = command(*words)
    assert result.code == 0, result.err
    return result.out


def test_there_and_back(make_checkpoint, tmp_path):
    folder = make_checkpoint("ck")
    layout = ("--target-tensor-parallel", 2, "--target-pipeline-parallel", 2)
    for to, name in (("megatron", "local layers"), ("deepspeed", "DeepSpeed's layer naming")):
        out = succeeded("export", folder, "--to", to, "--output", tmp_path / to, *layout)
        assert name in out
        assert "bit for bit" in out
        out = succeeded("import", tmp_path / to, "--output", tmp_path / f"{to}-back")
        assert "--finetune" in out
        assert "no optimizer state" in out or "no ZeRO files" in out
        out = succeeded("checkpoint", "diff", folder, tmp_path / to, "--values")
        assert "same model and tensor shapes" in out
        again = command("export", folder, "--to", to, "--output", tmp_path / to)
        assert again.code == 1
        assert "exists already" in again.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classic", "deepspeed", "universal", "dist"])
def test_inspect_and_diff(kind, original, make_checkpoint, tmp_path):
    state, model, _, _ = original()
    args, root = arguments(model, core=kind == "dist"), tmp_path / "m"
    if kind == "classic":
        write_classic(root, state, model, args=args)
    elif kind == "dist":
        write_torch_dist(root, state, model, args)
    elif kind == "universal":
        write_universal(root, state, model, args)
    else:
        write_deepspeed(root, state, model, args=args)
    out = succeeded("checkpoint", "inspect", root, "--tensors", "--config")
    assert "7" in out.split("iteration")[1].split()[0]
    assert "num_attention_heads" in out
    assert ("Add --vocab-size N" in out) is (kind in ("classic", "dist"))
    assert "layernorm" in out
    out = succeeded("checkpoint", "diff", tmp_path / "original", root, "--values")
    assert "same model and tensor shapes" in out
    same = succeeded("checkpoint", "diff", root, root, "--values")
    assert "0 of" not in same


def test_diff_takes_what_a_file_does_not_say(original, make_checkpoint, make_folder, gpt2, tmp_path):
    """A public file without args, against one of ours and against another without args."""
    state, model, _, _ = original()
    write_classic(tmp_path / "m", state, model, version=0, as_zip=False, old_names=True)
    write_classic(tmp_path / "n", state, model, 2, 2, version=2.0)
    flags = ("--num-attention-heads", 4, "--activation", "gelu_tanh", "--position-embedding-type", "absolute")
    std = ("--init-method-std", 0.08)
    for other in (tmp_path / "original", tmp_path / "n"):
        for words in ((tmp_path / "m", other), (other, tmp_path / "m")):
            result = command("checkpoint", "diff", *words, "--values")
            assert result.code == 1
            assert "Add --num-attention-heads N" in result.err
            out = succeeded("checkpoint", "diff", *words, "--values", *flags, "--vocab-size", VOCAB, *std)
            assert "same model and tensor shapes" in out
    result = command("checkpoint", "diff", tmp_path / "m", tmp_path / "n", *flags, "--num-layers", 5)
    assert result.code == 1
    assert "num_layers has two different values: 5 by --num-layers 5, and 4 by the tensors" in result.err
    folder = make_folder("gpt2", n_positions=64, **gpt2)
    for first, second in ((tmp_path / "original", tmp_path / "original"), (folder, tmp_path / "original")):
        result = command("checkpoint", "diff", first, second, "--num-layers", 4)
        assert result.code == 1
        assert "--num-layers 4 has no effect" in result.err
    result = command("checkpoint", "inspect", tmp_path / "m", "--num-layers", 4)
    assert result.code == 2
    assert "unrecognized arguments: --num-layers 4" in result.err


def test_a_run_is_told_what_to_type(original, tmp_path):
    state, model, _, _ = original()
    write_classic(tmp_path / "m", state, model, args=arguments(model))
    result = command("import", tmp_path / "m", "--output", tmp_path / "ck")
    assert result.code == 1
    assert "--vocab-size N" in result.err
    out = succeeded("import", tmp_path / "m", "--output", tmp_path / "ck", "--vocab-size", VOCAB)
    assert "to try it" in out
    words = ("--num-layers", 4, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 64)
    run = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1, "--lr", 1, "--train-iters", 1)
    result = command("train", *words, *run, "--device", "cpu", "--micro-batch-size", 1, "--load", tmp_path / "m")
    assert result.code == 1
    assert "megatron-lite import" in result.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--to", "hf", "--naming", "local", "--output", "x"), "--naming goes with"),
        (("--to", "megatron", "--push-to", "a/b", "--output", "x"), "--push-to goes with --to hf"),
        (("--to", "deepspeed", "--naming", "local", "--output", "x"), "--naming goes with --to megatron"),
        (("--to", "megatron"), "--output DIR"),
        (("--to", "megatron", "--vocab-file", "v", "--output", "x"), "--vocab-file goes with --to hf"),
        (("--to", "megatron", "--output", "x", "--target-tensor-parallel", "0"), "not a whole number from 1"),
    ],
)
def test_flags_that_do_not_go_together(words, text, make_checkpoint):
    result = command("export", make_checkpoint(), *words)
    assert result.code != 0
    assert text in result.err


def test_options_of_another_kind(make_folder, gpt2, tmp_path):
    folder = make_folder("gpt2", n_positions=64, **gpt2)
    for words in (("--weights-only",), ("--num-layers", "3"), ("--replicated", "first"), ("--checkpoint-version", "2")):
        result = command("import", folder, "--output", tmp_path / "ck", *words)
        assert result.code == 1
        assert words[0] in result.err
    assert not (tmp_path / "ck").exists()


def test_the_tokenizer_says_the_vocabulary(corpus, original, tmp_path):
    state, model, _, _ = original(vocab_size=300, padded_vocab_size=384)
    write_classic(tmp_path / "m", state, model, args=arguments(model))
    words = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", corpus.tokenizer)
    out = succeeded("import", tmp_path / "m", "--output", tmp_path / "ck", *words)
    assert "HuggingFaceTokenizer" in out
    assert (tmp_path / "ck" / "tokenizer" / "tokenizer.json").is_file()
    generated = command("generate", "--load", tmp_path / "ck", "--prompt", "abc", "--max-new-tokens", 2)
    assert generated.out.startswith("abc")
