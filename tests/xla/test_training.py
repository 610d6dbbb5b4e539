"""Tests of training on XLA devices: losses of every layout, resume, checkpoints of other devices, compilations."""

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_lite.cli.main import main
from megatron_lite.cli.train import run as train_command
from megatron_lite.errors import ConfigError

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


ONE_LAYER = "--num-layers 1 --tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8"
"""A graph of one micro-batch, on 4 x 2 devices: compiled in seconds."""


def command(device, metrics, flags, iterations, xla=""):
    """Return the arguments of a run: `flags` on every device, `xla` on XLA devices alone."""
    own = xla if device == "xla" else "--tensor-model-parallel-size 1 --micro-batch-size 8 --world-size 1"
    return f"{COMMON} --device {device} --train-iters {iterations} --metrics-file {metrics} {flags} {own}".split()


def train(device, folder, flags, iterations, *, xla=""):
    """Train, and return the reports of the iterations of this job."""
    folder.mkdir(exist_ok=True)
    metrics = folder / f"{device}-{len(list(folder.iterdir()))}.jsonl"
    assert main(command(device, metrics, flags, iterations, f"--xla-cache-path off {xla}")) == 0
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
    expected = train("cpu", tmp_path, model, 20)
    capsys.readouterr()
    found = train("xla", tmp_path, model, 20, xla=f"{layout} {sequence}")
    assert_equal(losses(found), losses(expected))
    assert_equal([r["grad_norm"] for r in found], [r["grad_norm"] for r in expected], 1e-4)
    assert compiled(capsys.readouterr().out) == [("training", "2 micro-batches of 8 x 16 tokens")]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    flags = f"{ONE_LAYER} --bf16 --use-distributed-optimizer --lr-decay-iters 6 --hidden-dropout 0.1"
    expected = train("xla", tmp_path / "whole", flags, 6)
    saves = f"--save {tmp_path}/run --load {tmp_path}/run --save-interval 100"
    found = train("xla", tmp_path / "parts", f"{flags} {saves}", 3)
    found += train("xla", tmp_path / "parts", f"{flags} {saves}", 6)
    assert losses(found) == losses(expected)
    assert [r["grad_norm"] for r in found] == [r["grad_norm"] for r in expected]


@pytest.mark.parametrize("model", [LLAMA, ALBERT], ids=["llama", "albert"])
def test_checkpoints_move_between_the_cpu_and_xla_devices(model, tmp_path):
    flags = f"{ONE_LAYER} {model} --lr-decay-iters 6".replace("--num-layers 1", "--num-layers 2")
    expected = train("cpu", tmp_path / "whole", flags, 6)
    saves = f"--save {tmp_path}/run --load {tmp_path}/run --save-interval 100"
    found = []
    for device, end in (("cpu", 2), ("xla", 4), ("cpu", 6)):
        zero = "--use-distributed-optimizer" if device == "xla" else ""
        found += train(device, tmp_path / "parts", f"{flags} {saves} {zero}", end)
    assert_equal(losses(found), losses(expected))


def test_a_batch_ramp_up_compiles_once_for_each_number_of_micro_batches(tmp_path, capsys):
    flags = f"{ONE_LAYER} --global-batch-size 16 --rampup-batch-size 8 8 16"
    expected = train("cpu", tmp_path, flags, 5)
    capsys.readouterr()
    found = train("xla", tmp_path, flags, 5)
    assert [r["global_batch_size"] for r in found] == [8, 8, 16, 16, 16]
    assert_equal(losses(found), losses(expected))
    out = capsys.readouterr().out
    assert compiled(out) == [
        ("training", "1 micro-batch of 8 x 16 tokens"),
        ("training", "2 micro-batches of 8 x 16 tokens"),
    ]
    assert "WARNING: the training step of 2 micro-batches" in out
    assert "because it has 2 micro-batches instead of 1" in out


def test_recomputation_draws_the_same_dropout(tmp_path):
    flags = f"{ONE_LAYER} --hidden-dropout 0.1 --attention-dropout 0.1"
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    expected = losses(train("xla", tmp_path, flags, 3))
    assert_equal(losses(train("xla", tmp_path, f"{flags} {full}", 3)), expected, 1e-6)
    assert_equal(losses(train("xla", tmp_path, f"{flags} --recompute-granularity selective", 3)), expected, 1e-6)
    without = losses(train("xla", tmp_path, ONE_LAYER, 3))
    assert abs(without[1] - expected[1]) > 1e-4


def test_sgd_bf16_validation_and_statistics_equal_those_of_the_cpu(tmp_path, capsys):
    flags = (
        f"{ONE_LAYER} --optimizer sgd --lr 0.1 --log-params-norm --log-num-zeros-in-grad --calculate-per-token-loss "
        "--eval-iters 2 --eval-interval 2 --lr-factors mlp=0.5 --freeze input_norm"
    )
    expected = train("cpu", tmp_path, flags, 4)
    valid = re.findall(r"lm loss value: (\S+)", capsys.readouterr().out)
    found = train("xla", tmp_path, flags, 4)
    assert_equal(losses(found), losses(expected))
    assert_equal([r["params_norm"] for r in found], [r["params_norm"] for r in expected])
    # An element may round to zero on one of the two.
    assert all(abs(a["num_zeros"] - b["num_zeros"]) <= 2 for a, b in zip(found, expected, strict=True))
    assert re.findall(r"lm loss value: (\S+)", capsys.readouterr().out) == valid and len(valid) == 4
    bf16 = losses(train("xla", tmp_path, f"{flags} --bf16", 4))
    assert_equal(bf16, losses(expected), 0.01)


def test_a_job_in_a_process_of_its_own(tmp_path):
    """As a user starts it: the runtime is started by the program."""
    argv = command("xla", tmp_path / "metrics.jsonl", ONE_LAYER, 2, f"--xla-cache-path {tmp_path}/cache")
    # torch_xla has set the level of its log in this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_CPP")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lite", *argv], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 ranks (tensor 2 x pipeline 1 x data 4)" in done.stdout and "4 x 2 devices" in done.stdout
    assert "compilation cache off, because XLA's CPU client cannot read compiled graphs" in done.stdout
    assert compiled(done.stdout) == [("training", "1 micro-batch of 8 x 16 tokens")]
    assert "GSPMD" not in done.stderr


def test_another_number_of_devices_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--world-size 4 is not .*: 8 \(CPU\).* CPU_NUM_DEVICES=4"):
        train_command(command("xla", tmp_path / "x", f"{ONE_LAYER} --world-size 4", 1)[1:])
