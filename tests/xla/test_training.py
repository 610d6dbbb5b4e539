"""Tests of training on XLA devices: losses of every layout, resume, checkpoints of other devices, compilations."""

import json
import re

import pytest

from megatron_lite.cli.main import main

COMMON = (
    "train --num-layers 2 --hidden-size 32 --num-attention-heads 8 --seq-length 16 --max-position-embeddings 16 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --split 90,10,0 --eval-iters 0 --lr 1e-3 "
    "--global-batch-size 16 --log-interval 1 --hidden-dropout 0 --attention-dropout 0"
)
LLAMA = (
    "--position-embedding-type rotary --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 4"
)
ALBERT = "--share-layers all --embedding-size 16"
BLOOM = "--position-embedding-type alibi --embed-layernorm"


def train(device, folder, flags, iterations, *, micro_batch=8, xla=""):
    """Train, and return the reports of the iterations."""
    own = f"--xla-cache-path off {xla}" if device == "xla" else f"--micro-batch-size {micro_batch} --world-size 1"
    metrics = folder / "metrics.jsonl"
    argv = f"{COMMON} --device {device} --train-iters {iterations} --metrics-file {metrics} {own} {flags}".split()
    assert main(argv) == 0
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record for record in records if record["kind"] == "iteration"]


def losses(reports):
    return [report["losses"]["lm loss"] for report in reports]


def compiled(text):
    return re.findall(r"the (training|evaluation) step of (.*?) was compiled", text)


def assert_equal(found, expected, relative=1e-5):
    assert len(found) == len(expected)
    assert max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)) < relative


@pytest.mark.parametrize(
    ("dp", "tp", "model"),
    [(8, 1, "--add-qkv-bias"), (4, 2, LLAMA), (2, 4, ALBERT), (1, 8, BLOOM)],
    ids=["8x1", "4x2", "2x4", "1x8"],
)
def test_losses_of_every_layout_equal_those_of_the_cpu_in_one_compilation(dp, tp, model, tmp_path, capsys):
    layout = f"--tensor-model-parallel-size {tp} --micro-batch-size {8 // dp} --use-distributed-optimizer"
    sequence = "--sequence-parallel" if tp == 2 else ""
    (tmp_path / "cpu").mkdir()
    expected = train("cpu", tmp_path / "cpu", model, 20)
    capsys.readouterr()
    found = train("xla", tmp_path, model, 20, xla=f"{layout} {sequence}")
    assert_equal(losses(found), losses(expected))
    assert_equal([r["grad_norm"] for r in found], [r["grad_norm"] for r in expected], 1e-4)
    assert compiled(capsys.readouterr().out) == [("training", "2 micro-batches of 8 x 16 tokens")]
