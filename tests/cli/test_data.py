"""CLI command `data`: output and errors of each action."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megatron_lite.cli.main import main
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.manifest import manifest_path

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


@pytest.fixture
def prefix(tmp_path):
    rng = np.random.RandomState(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for size in rng.randint(1, 90, 120):
            writer.add_document(rng.randint(0, 100, size))
    return str(tmp_path / "corpus")


def job(prefix, *more):
    args = (
        "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 16 --max-position-embeddings 16 "
        "--micro-batch-size 2 --global-batch-size 4 --train-iters 50 --lr 0.1 --split 8,1,1"
    )
    return [*args.split(), *NULL, "--data-path", prefix, *more]


def test_inspect_prints_counts_histogram_and_documents(prefix, tmp_path, capsys):
    assert main(["data", "inspect", prefix, "--picture", str(tmp_path / "lengths.svg"), "--documents", "2"]) == 0
    out = capsys.readouterr().out
    data = IndexedDataset(prefix)
    assert f"{data.num_tokens:,} as uint16" in out
    assert "█" in out
    first = " ".join(str(token) for token in data.document(0)[:64])
    assert f"document 0, {len(data.document(0))} tokens\n  {first}" in out
    assert (tmp_path / "lengths.svg").read_text(encoding="utf-8").startswith("<svg")
    assert main(["data", "inspect", prefix, *NULL]) == 0


def test_verify_prints_its_checks(prefix, capsys):
    assert main(["data", "verify", prefix]) == 0
    assert "give a tokenizer" in capsys.readouterr().out
    assert main(["data", "verify", prefix, *NULL]) == 0
    assert "ids below 101" in capsys.readouterr().out
    assert main(["data", "verify", prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]) == 1
    assert "the vocabulary has 51" in capsys.readouterr().err


def test_verify_finds_a_changed_byte_by_the_manifest(tmp_path, capsys):
    jsonl = tmp_path / "in.jsonl"
    jsonl.write_text("".join(f'{{"text": "{number} {number + 1}"}}\n' for number in range(90)), encoding="utf-8")
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


def test_the_whole_command_of_a_job_is_accepted(prefix, capsys):
    expected = []
    for launch in ([], ["torchrun", "--nproc-per-node", "2", "pretrain_gpt.py"]):
        assert main(["data", "samples", "--iteration", "3", *launch, *job(prefix)]) == 0
        assert main(["data", "index", *launch, *job(prefix)]) == 0
        expected.append(re.sub(r"[\d.]+ s$", "", capsys.readouterr().out, flags=re.M))
    assert expected[0] == expected[1]


@pytest.mark.parametrize("more", [[], ["--dataloader-type", "cyclic"]])
def test_samples_of_an_iteration_equal_those_of_training(prefix, capsys, more):
    from megatron_lite.config.arguments import parse_run
    from megatron_lite.data.serving.build import build_datasets
    from megatron_lite.data.serving.loader import Loader

    assert main(["data", "samples", "--iteration", "3", "--tokens", "1000", *job(prefix, *more)]) == 0
    out = capsys.readouterr().out
    assert "iteration 3: samples 8 to 11, 16 tokens each" in out
    printed = [int(word) for line in re.findall(r"^    '(.*)'$", out, re.M) for word in line.split()]
    config = parse_run(job(prefix, *more)).config
    dataset = build_datasets(config, vocab_size=101).train
    loader = Loader(dataset, micro_batch=2, global_batch=lambda _: 4, cyclic_layout=(2, 1) if more else None)
    assert printed == loader.read(8, 4).ravel().tolist()


@pytest.mark.parametrize(
    ("iteration", "args", "message"),
    [
        ("51", (), "--iteration 51 is out of range: with these flags the run has 50"),
        ("8", ("--train-samples", "30"), "--iteration 8 is out of range: with these flags the run has 7"),
    ],
)
def test_samples_refuses_an_iteration_after_the_last(prefix, capsys, iteration, args, message):
    flags = job(prefix, *args)
    if args:
        at = flags.index("--train-iters")
        del flags[at : at + 2]
    assert main(["data", "samples", "--iteration", iteration, *flags]) == 1
    assert message in capsys.readouterr().err


def test_samples_account_for_checkpoints_and_rollbacks(prefix, tmp_path, capsys):
    runs = ["--load", str(tmp_path / "run"), "--save", str(tmp_path / "run"), "--save-interval", "10"]
    short = [*job(prefix, *runs), "--eval-iters", "0", "--log-interval", "50", "--device", "cpu"]
    assert main(["train", *short, "--exit-interval", "20"]) == 0
    assert main(["rollback", str(tmp_path / "run"), "--to", "10", "--skip-samples", "44-47"]) == 0
    larger = [word if word != "4" else "8" for word in short]
    capsys.readouterr()
    for flags, iteration, expected in (
        (short, "11", ["40", "41", "42", "43"]),
        (short, "12", ["48", "49", "50", "51"]),
        (larger, "12", [str(52 + number) for number in range(8)]),
    ):
        assert main(["data", "samples", "--iteration", iteration, *flags]) == 0
        assert re.findall(r"^sample (\d+)", capsys.readouterr().out, re.M) == expected


def test_pack_prints_statistics_and_training_reads_its_sequences(prefix, tmp_path, capsys):
    from megatron_lite.config.arguments import parse_run
    from megatron_lite.data.serving.build import build_datasets

    marked, packed = str(tmp_path / "marked"), str(tmp_path / "packed")
    data = IndexedDataset(prefix)
    with IndexedDatasetWriter(marked, np.uint16) as writer:
        for number in range(data.num_documents):
            writer.add_document([*data.document(number).tolist(), 100])
    assert main(["data", "pack", marked, packed, "--seq-length", "16"]) == 1
    assert "it has no manifest" in capsys.readouterr().err
    args = ["data", "pack", marked, packed, "--seq-length", "16", *NULL]
    assert main(args) == 0
    out = capsys.readouterr().out
    bins = IndexedDataset(packed)
    assert f"{len(bins):,} of 16 tokens" in out
    assert f"--data-path {packed} --seq-length 16 --eod-mask-loss" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert main(args) == 0
    assert "Already complete" in capsys.readouterr().out
    assert main(["data", "verify", packed, *NULL]) == 0
    assert main(["data", "inspect", packed]) == 0
    assert "for --seq-length 16" in capsys.readouterr().out
    flags = job(packed, "--eod-mask-loss")
    flags[flags.index("50")] = "200"
    train = build_datasets(parse_run(flags).config, vocab_size=101).train
    assert len(train) > len(bins)
    contents = {tuple(bins.document(number).tolist()) for number in range(len(bins))}
    assert all(tuple(train[sample][:-1].tolist()) in contents for sample in range(len(train)))


def test_flags_that_do_not_match_packed_data_cause_warnings(prefix, tmp_path, capsys):
    packed = str(tmp_path / "packed")
    with IndexedDatasetWriter(tmp_path / "marked", np.uint16) as writer:
        for size in range(1, 60):
            writer.add_document([*range(size), 100])
    assert main(["data", "pack", str(tmp_path / "marked"), packed, "--seq-length", "32", *NULL]) == 0
    assert main(["data", "index", *job(packed)]) == 0
    out = capsys.readouterr().out
    assert "packed in sequences of 32 tokens, --seq-length is 16" in out
    assert "without --eod-mask-loss" in out


def test_verify_continues_after_a_damaged_dataset(prefix, tmp_path, capsys):
    assert main(["data", "verify", str(tmp_path), prefix]) == 1
    said = capsys.readouterr()
    assert f"{prefix}: OK" in said.out
    assert (
        f"is a folder, not the common prefix of a .bin and an .idx file. Give a dataset of that folder: {prefix}"
        in said.err
    )
    assert main(["data", "inspect", prefix, "--picture", str(tmp_path / "corpus.bin" / "lengths.svg")]) == 1
    assert "--picture" in capsys.readouterr().err
    before = (tmp_path / "corpus.bin").read_bytes()
    assert main(["data", "inspect", prefix, "--picture", f"{prefix}.bin"]) == 1
    assert "Refusing to replace --picture" in capsys.readouterr().err
    assert (tmp_path / "corpus.bin").read_bytes() == before


def test_index_builds_every_set(prefix, capsys):
    assert main(["data", "index", *job(prefix)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train: ", "valid: ", "test (test): "))


def test_index_prints_the_caches_it_found(prefix, capsys):
    """With one document of 16 tokens per sample, Megatron's arrays are simple."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_batch(np.full(300 * 16, 5), np.full(300, 16), np.ones(300, np.int64))
    rng = np.random.RandomState(1234)
    documents, shuffle = np.arange(240, dtype=np.int32), np.arange(239, dtype=np.uint32)
    rng.shuffle(documents)
    rng.shuffle(shuffle)
    rows = np.stack([np.arange(240, dtype=np.int32), np.zeros(240, np.int32)], axis=1)
    for part, values in {"doc_idx": documents, "sample_idx": rows, "shuffle_idx": shuffle}.items():
        np.save(f"{prefix}_train_indexmap_200ns_16sl_1234s_{part}.npy", values)
    assert main(["data", "index", *job(prefix)]) == 0
    assert "using Megatron's index cache" in capsys.readouterr().out
    assert main(["data", "index", *job(prefix, "--split", "7,2,1")]) == 0
    assert "Stale index cache" in capsys.readouterr().out


def test_a_job_without_its_data_is_an_error(tmp_path, capsys):
    assert main(["data", "index", *job(str(tmp_path / "absent"))]) == 1
    assert "absent" in capsys.readouterr().err


def test_the_error_of_an_older_dataset_names_the_conversion(tmp_path, capsys):
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\0\0" + b"\0" * 60)
    (tmp_path / "old.bin").write_bytes(b"")
    assert main(["data", "inspect", str(tmp_path / "old")]) == 1
    assert "megatron-lite data convert" in capsys.readouterr().err
    assert main(["data", "convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "older format" in capsys.readouterr().err


def test_usage(capsys):
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
    assert main(["data", "inspct"]) == 2
    assert "unknown action 'inspct'" in capsys.readouterr().err
