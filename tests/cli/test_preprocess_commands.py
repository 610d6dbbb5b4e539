"""CLI commands preprocess, merge and train-tokenizer with the command lines of both Megatrons."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.cli import merge, preprocess, train_tokenizer
from megatron_lite.cli.main import main
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.errors import ConfigError

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"the cat {i} sat", "inputs": "a cat"}) + "\n" for i in range(50)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus):
    folder = corpus.parent / "tokenizer"
    args = ["--input", str(corpus), "--output", str(folder), "--vocab-size", "300"]
    assert train_tokenizer.run(args) == 0
    return folder


def test_megatron_deepspeed(corpus, tokenizer, tmp_path, capsys):
    args = ["--input", corpus, "--output-prefix", tmp_path / "out", "--dataset-impl", "mmap", "--tokenizer-type"]
    args += ["GPT2BPETokenizer", "--merge-file", tokenizer / "merges.txt", "--vocab", tokenizer / "vocab.json"]
    args += ["--append-eod", "--workers", "1", "--json-key", "inputs", "--log-interval", "10"]
    assert preprocess.run([*map(str, args)]) == 0
    assert len(IndexedDataset(tmp_path / "out_inputs_document")) == 50
    said = capsys.readouterr()
    assert f"--data-path {shlex.quote(str(tmp_path / 'out_inputs_document'))}" in said.out
    assert "Processed 50 documents (" in said.err


def test_megatron_lm(corpus, tokenizer, tmp_path, capsys):
    args = ["--input", corpus, "--output-prefix", tmp_path / "out", "--tokenizer-type", "HuggingFaceTokenizer"]
    args += ["--tokenizer-model", tokenizer, "--append-eod", "--workers", "1", "--partitions", "2"]
    args += ["--json-keys", "text", "inputs", "--make-vocab-size-divisible-by", "128"]
    assert preprocess.run([*map(str, args)]) == 0
    assert "--partitions 2 has no effect" in capsys.readouterr().err
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in tmp_path.glob("out_*"):
        path.rename(folder / path.name)
    assert merge.run(["--input", str(folder), "--output-prefix", str(tmp_path / "merged")]) == 0
    both = [str(folder / f"out_{key}_document") for key in ("inputs", "text")]
    assert merge.run(["--datasets", *both, "--output-prefix", str(tmp_path / "merged2")]) == 0
    assert (tmp_path / "merged.idx").read_bytes() == (tmp_path / "merged2.idx").read_bytes()
    assert IndexedDataset(tmp_path / "merged").num_documents == 100


@pytest.mark.parametrize("tool", ["preprocess_data", "merge_datasets", "merge_preprocessed_data", "train_tokenizer"])
def test_tools_run_from_a_checkout(tool, tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOLS / f"{tool}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "usage:" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_help_on_a_terminal_without_utf_8(encoding):
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--help"]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert b"--input FILE \\u2026" in done.stdout


def test_refused_arguments(corpus, tmp_path, capsys):
    args = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out")]
    for more, message in (
        ([], "No tokenizer is given"),
        (["--tokenizer-type", "NullTokenizer"], "--vocab-size"),
        (["--tokenizer-model", "x", "--dataset-impl", "lazy"], "--dataset-impl"),
    ):
        with pytest.raises(ConfigError, match=message):
            preprocess.run(args + more)
    with pytest.raises(ConfigError, match="--datasets PREFIX"):
        merge.run(["--output-prefix", "x"])
    with pytest.raises(ConfigError, match="--multimodal"):
        merge.run(["--output-prefix", "x", "--multimodal"])
    assert main(["preprocess", *args, "--tokenizer-model", "absent/model"]) == 1
    assert "DataError" in capsys.readouterr().err


def test_interrupted(corpus, tokenizer, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_lite.data.preparation.worker.UnitWorker.run", stop)
    args = ["--input", corpus, "--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizer]
    assert preprocess.run([*map(str, args)]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_finding_the_number_of_workers(corpus, tokenizer, tmp_path, capsys):
    args = ["--input", corpus, "--output-prefix", tmp_path / "out", "--tokenizer-model", tokenizer]
    args += ["--find-optimal-num-workers", "--workers-to-check", "1", "2", "--max-documents", "20"]
    assert preprocess.run([*map(str, args)]) == 0
    assert "Fastest on this machine: --workers" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_training_sentencepiece_and_bad_input(corpus, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    args = ["--input", str(corpus), "--output", str(tmp_path), "--vocab-size", "280", "--tokenizer-type"]
    assert train_tokenizer.run([*args, "SentencePieceTokenizer"]) == 0
    use = shlex.split(capsys.readouterr().out)
    args = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    assert preprocess.run(args + use[use.index("--tokenizer-type") :]) == 0
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    args = ["train-tokenizer", "--input", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "t")]
    assert main([*args, "--vocab-size", "300"]) == 1
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert main([*args, "--vocab-size", "300", "--skip-bad-lines"]) == 0


def test_a_trained_tokenizer_is_not_replaced_unasked(corpus, tmp_path, capsys):
    args = ["train-tokenizer", "--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "280"]
    assert main(args) == 0
    before = (tmp_path / "t" / "tokenizer.json").read_bytes()
    assert main([*args[:-1], "258"]) == 1
    assert "contains a tokenizer already (tokenizer.json)" in capsys.readouterr().err
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == before
    use = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "t")]
    assert main(["preprocess", "--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *use]) == 0
    assert main([*args[:-1], "258", "--overwrite"]) == 0
    assert main(["data", "inspect", str(tmp_path / "out_text_document"), *use]) == 0
    assert "WARNING" in (text := capsys.readouterr().err) and "was made with another vocabulary than that of" in text


def test_a_folder_of_text_files(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number}.txt").write_text(f"the cat {number} sat")
    args = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "t"), "--vocab-size", "300"]
    assert train_tokenizer.run([*args, "--sample-files", "5", "--sample-documents", "0.9", "--seed", "1"]) == 0
    args = ["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out"), "--prepend-eod"]
    args += ["--tokenizer-model", str(tmp_path / "t"), "--min-document-tokens", "30", "--join-short"]
    assert preprocess.run(args) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "input 20 files" in text and "joined" in text
    assert IndexedDataset(tmp_path / "out_text_document").sizes.min() >= 30
    lines = tmp_path / "lines"
    lines.write_text("one line\nand another")
    args = ["--input", str(lines), "--output-prefix", str(tmp_path / "b"), "--tokenizer-model", str(tmp_path / "t")]
    assert preprocess.run([*args, "--plain-text", "line"]) == 0
    assert len(IndexedDataset(tmp_path / "b_text_document")) == 2


def test_abbreviations_of_several_spellings_of_one_flag():
    args = preprocess.build_parser().parse_args(["--input", "x", "--output-prefix", "y", "--merge", "merges.txt"])
    assert args.tokenizer_merge_file == "merges.txt"
    with pytest.raises(SystemExit):
        preprocess.build_parser().parse_args(["--input", "x", "--output-prefix", "y", "--m", "merges.txt"])


def test_abbreviations_of_other_flags_are_refused(capsys):
    """Megatron's preprocess_data.py has no --min-document-tokens; train_tokenizer.py is no tool of Megatron's."""
    for parser, args in (
        (preprocess.build_parser(), ["--input", "x", "--output-prefix", "y", "--min-doc", "4"]),
        (train_tokenizer.build_parser(), ["--input", "x", "--output", "y", "--vocab-size", "300", "--min-freq", "4"]),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(args)
        assert f"unrecognized arguments: {args[-2]} 4" in capsys.readouterr().err


@pytest.mark.parametrize("end", [(), ("--append-eod",)])
def test_documents_joined_without_a_separator_are_reported(corpus, tmp_path, capsys, end):
    args = ["--input", str(corpus), "--output", str(tmp_path / "t"), "--vocab-size", "300"]
    assert train_tokenizer.run(args) == 0
    args = ["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), "--tokenizer-model", str(tmp_path / "t")]
    assert preprocess.run([*args, "--min-tokens", "30", "--join-short", *end]) == 0
    printed = capsys.readouterr()
    assert ("joins documents without a token between them" in printed.err) == (not end)
    assert "tokens in the input, without special tokens)" in printed.out
