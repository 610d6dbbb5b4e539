"""Ranks with different command lines or files: detected at start, reported once."""

import re
import shutil
import socket

import pytest
from support.trainer import command, preprocess, status

pytestmark = pytest.mark.slow

HOST = socket.gethostname()


def job(corpus, *args, data=None):
    timeouts = ("--distributed-timeout-minutes", 0.5, "--rendezvous-timeout-minutes", 1)
    return corpus.job("--train-iters", 3, *timeouts, *args, data=data)


def said(results):
    """Return the error of rank 0; check that all ranks failed and only rank 0 printed it."""
    assert [result.code for result in results] == [1] * len(results), results
    assert results[0].err.count("RankDifferenceError") == 1
    for result in results[1:]:
        assert "Error" not in result.err, result.err
    return results[0].err


@pytest.mark.parametrize(
    ("args", "lines"),
    [
        (
            ("--lr", 2e-3, "--seed", 7),
            [
                f"--lr 0.002 on rank 1 ({HOST}), --lr 0.001 on rank 0 ({HOST})",
                f"--seed 7 on rank 1 ({HOST}), --seed 1234 on rank 0 ({HOST})",
            ],
        ),
        (("--num-layers", 4), [f"--num-layers 4 on rank 1 ({HOST}), --num-layers 2 on rank 0 ({HOST})"]),
        (
            ("--tensor-model-parallel-size", 2, "--distributed-timeout-minutes", 0.4),
            [
                f"--tensor-model-parallel-size 2 on rank 1 ({HOST}), --tensor-model-parallel-size 1 on rank 0 ({HOST})",
                f"--distributed-timeout-minutes 0.4 on rank 1 ({HOST}), --distributed-timeout-minutes 0.5 on rank 0",
            ],
        ),
    ],
)
def test_other_flags(corpus, ranks, args, lines):
    text = said(ranks(job(corpus), job(corpus, *args)))
    shown = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    assert len(shown) == len(lines), "only what differs"
    for line, expected in zip(shown, lines, strict=True):
        assert line.startswith(expected)
    assert "same command line" in text


def test_allowed_differences(corpus, ranks, tmp_path):
    copy = [shutil.copy(f"{corpus.data[0]}{suffix}", tmp_path / f"copy{suffix}") for suffix in (".bin", ".idx")]
    # One thread: threads of OpenMP do not survive the fork that starts a rank.
    args = ("--data-cache-path", tmp_path, "--metrics-file", tmp_path / "metrics.jsonl")
    results = ranks(job(corpus), job(corpus, *args, data=copy[0].with_suffix("")))
    assert [result.code for result in results] == [0, 0], results


def test_another_environment(corpus, ranks):
    text = said(ranks(job(corpus), job(corpus), NVIDIA_TF32_OVERRIDE="0"))
    assert f"NVIDIA_TF32_OVERRIDE=0 on rank 1 ({HOST}), no NVIDIA_TF32_OVERRIDE on rank 0" in text


def test_another_tokenizer(corpus, ranks, tmp_path):
    other = tmp_path / "tokenizer"
    trained = command("train-tokenizer", "--input", corpus.text, "--output", other, "--vocab-size", 299)
    assert trained.code == 0
    save = tmp_path / "run"
    save.mkdir()
    args = ("--save", save, "--save-interval", 3)
    text = said(ranks(job(corpus, *args), job(corpus, *args, "--tokenizer-model", other)))
    assert text.count("\n  tokenizer sha256:") == 1 and f"on rank 1 ({HOST}), tokenizer sha256:" in text
    ended = status(save)
    assert (ended["status"], ended["rank"], ended["host"]) == ("error", 1, HOST)


def test_other_data_of_the_same_size(corpus, ranks, tmp_path):
    other = tmp_path / "data"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus.data[0]}{suffix}", f"{other}{suffix}")
    content = bytearray(other.with_suffix(".bin").read_bytes())
    content[:4] = content[4:8]
    other.with_suffix(".bin").write_bytes(content)
    text = said(ranks(job(corpus), job(corpus, data=other)))
    assert f"({other}) on rank 1 ({HOST}), data source 1 " in text and f"({corpus.data[0]}) on rank 0" in text


def test_other_data_of_another_size(corpus, ranks, tmp_path):
    text = said(ranks(job(corpus), job(corpus, data=corpus.data[1])))
    assert "data source 1 " in text


def test_files_missing_on_one_rank(corpus, ranks, tmp_path):
    args = ("--tokenizer-model", tmp_path / "none", "--data-path", tmp_path / "no_data")
    text = said(ranks(job(corpus), job(corpus, *args)))
    assert f"rank 1 ({HOST}): 2 errors:" in text
    assert f"--tokenizer-model {tmp_path / 'none'} does not exist" in text


def test_files_missing_on_all_ranks_are_reported_once(corpus, ranks, tmp_path):
    args = job(corpus, "--tokenizer-model", tmp_path / "none")
    results = ranks(args, args)
    assert [result.code for result in results] == [1, 1]
    assert results[0].err.count("ConfigError: --tokenizer-model") == 1
    assert results[1].err == ""


def test_a_damaged_tokenizer_on_one_rank(corpus, ranks, tmp_path):
    broken = shutil.copytree(corpus.tokenizer, tmp_path / "tokenizer")
    (broken / "tokenizer.json").write_text("{")
    text = said(ranks(job(corpus), job(corpus, "--tokenizer-model", broken)))
    assert f"rank 1 ({HOST}): " in text and str(broken) in text


def test_another_gpu_model_is_a_warning(corpus, ranks):
    def prepare(rank):
        from megatron_lite.backend.cpu import CpuBackend

        CpuBackend.device_name = lambda self: f"card {rank}"

    results = ranks(job(corpus), job(corpus), prepare=prepare)
    assert [result.code for result in results] == [0, 0]
    assert f"WARNING: device card 1 on rank 1 ({HOST}), device card 0 on rank 0 ({HOST})" in results[1].out


def test_a_device_without_the_precision_on_one_rank(corpus, ranks):
    def prepare(rank):
        from megatron_lite.backend.base import Capabilities
        from megatron_lite.backend.cpu import CpuBackend

        if rank:
            CpuBackend.capabilities = lambda self: Capabilities(dtypes=frozenset({"fp32", "fp16"}))

    text = said(ranks(job(corpus, "--bf16"), job(corpus, "--bf16"), prepare=prepare))
    assert re.search(rf"rank 1 \({HOST}\): .* does not support bf16", text)


def test_a_blend_of_other_sources(corpus, ranks, tmp_path):
    made = preprocess(corpus.text, tmp_path / "x", corpus.tokenizer)
    assert made.code == 0
    other = ("--data-path", 0.5, corpus.data[0], 0.5, tmp_path / "x_text_document")
    text = said(ranks(job(corpus), job(corpus, *other)))
    assert f"--data-path 0.5 PATH 0.5 PATH on rank 1 ({HOST}), --data-path PATH on rank 0" in text
