"""megatron-lite data: what each action prints, and how it fails."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megatron_lite.cli.main import main
from megatron_lite.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_lite.data.preprocess.manifest import manifest_path

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


@pytest.fixture
def prefix(tmp_path):
    rng = np.random.RandomState(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for size in rng.randint(1, 90, 120):
            writer.add_document(rng.randint(0, 100, size))
    return str(tmp_path / "corpus")


def job(prefix, *more):
    words = (
        "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16 "
        "--micro-batch-size 2 --global-batch-size 4 --train-iters 50 --lr 0.1 --split 8,1,1"
    )
    return [*words.split(), *NULL, "--data-path", prefix, *more]


def test_inspect_counts_draws_and_shows_documents(prefix, tmp_path, capsys):
    assert main(["data", "inspect", prefix, "--picture", str(tmp_path / "lengths.svg"), "--documents", "2"]) == 0
    out = capsys.readouterr().out
    data = IndexedDataset(prefix)
    assert f"{data.num_tokens:,} as uint16" in out
    assert "█" in out
    first = " ".join(str(token) for token in data.document(0)[:64])
    assert f"document 0, {len(data.document(0))} tokens\n  {first}" in out
    assert (tmp_path / "lengths.svg").read_text().startswith("<svg")
    assert main(["data", "inspect", prefix, *NULL]) == 0


def test_verify_says_what_it_checked(prefix, capsys):
    assert main(["data", "verify", prefix]) == 0
    assert "give a tokenizer" in capsys.readouterr().out
    assert main(["data", "verify", prefix, *NULL]) == 0
    assert "ids below 101" in capsys.readouterr().out
    assert main(["data", "verify", prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]) == 1
    assert "the vocabulary has 51" in capsys.readouterr().err


def test_verify_finds_a_flipped_byte_by_the_manifest(tmp_path, capsys):
    jsonl = tmp_path / "in.jsonl"
    jsonl.write_text("".join(f'{{"text": "{number} {number + 1}"}}\n' for number in range(90)))
    prefix = str(tmp_path / "out")
    assert main(["preprocess", "--input", str(jsonl), "--output-prefix", prefix, "--workers", "1", *NULL]) == 0
    prefix += "_text_document"
    assert manifest_path(prefix).is_file()
    assert main(["data", "verify", prefix]) == 0
    assert "checksums" in capsys.readouterr().out
    content = bytearray((tmp_path / "out_text_document.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "out_text_document.bin").write_bytes(content)
    assert main(["data", "verify", prefix]) == 1
    assert "manifest" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dataloader-type", "cyclic"]])
def test_samples_of_an_iteration_are_those_that_training_reads(prefix, capsys, more):
    from megatron_lite.config.arguments import parse_run
    from megatron_lite.data.build import build_datasets
    from megatron_lite.data.loader import Loader

    assert main(["data", "samples", "--iteration", "3", "--tokens", "1000", *job(prefix, *more)]) == 0
    out = capsys.readouterr().out
    assert "iteration 3: samples 8 to 11, 16 tokens each" in out
    printed = [int(word) for line in re.findall(r"^    '(.*)'$", out, re.M) for word in line.split()]
    config = parse_run(job(prefix, *more)).config
    dataset = build_datasets(config, vocab_size=101).train
    with Loader(dataset, micro_batch=2, global_batch=lambda _: 4, cyclic=bool(more)) as loader:
        assert printed == loader.read(8, 4).ravel().tolist()


def test_samples_numbers_iterations_from_one(prefix, capsys):
    assert main(["data", "samples", "--iteration", "0", *job(prefix)]) == 1
    assert "numbered from 1" in capsys.readouterr().err


def test_index_builds_every_set(prefix, capsys):
    assert main(["data", "index", *job(prefix)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train: ", "valid: ", "test (test): "))


def test_a_job_without_its_data_is_an_error(tmp_path, capsys):
    assert main(["data", "index", *job(str(tmp_path / "absent"))]) == 1
    assert "absent" in capsys.readouterr().err


def test_an_older_dataset_says_how_to_convert_it(tmp_path, capsys):
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\0\0" + b"\0" * 60)
    (tmp_path / "old.bin").write_bytes(b"")
    assert main(["data", "inspect", str(tmp_path / "old")]) == 1
    assert "megatron-lite data convert" in capsys.readouterr().err
    assert main(["data", "convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "older kind" in capsys.readouterr().err


def test_usage(capsys):
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert main(["data", "inspct"]) == 2
    assert "no action 'inspct'" in capsys.readouterr().err
