"""Tests of jobs on a device like a Mac's GPU: no float64, no fused optimizers, no usable attention kernel."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.backend import select
from megatron_lite.backend.base import Capabilities
from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.mps import MpsBackend
from megatron_lite.cli.main import main

COMMON = (
    "train --device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
    "--max-position-embeddings 16 --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --split 90,10,0 "
    "--eval-iters 1 --eval-interval 2 --lr 1e-3 --train-iters 4 --micro-batch-size 2 --global-batch-size 4 "
    "--log-interval 1 --clip-grad 0.5 --log-num-zeros-in-grad --log-params-norm --hidden-dropout 0 --save-interval 2"
)


class Device(CpuBackend):
    """CPU that has what a Mac's GPU has."""

    attention = MpsBackend.attention

    def capabilities(self):
        return Capabilities(fused_adam=False, float64=False)


class NoFloat64(TorchDispatchMode):
    """Raises AssertionError if an operator returns a tensor that a Mac's GPU cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        dtypes = {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        assert not dtypes & {torch.float64, torch.complex64, torch.complex128}, f"{func} returns {dtypes}"
        return result


def records(folder, name, flags, *ends):
    """Train, in a job for each iteration in `ends`; return the values of the iterations."""
    metrics = folder / f"{name}.jsonl"
    saves = f"--save {folder}/{name} --load {folder}/{name} --metrics-file {metrics}"
    for end in ends:
        assert main(f"{COMMON} {saves} {flags} --exit-interval {end}".split()) == 0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "iteration"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--fp16 --initial-loss-scale 256 --loss-scale-window 2 --position-embedding-type alibi",
        "--optimizer sgd --position-embedding-type rotary --ema-decay 0.9 --calculate-per-token-loss",
    ],
    ids=["adam", "sgd"],
)
def test_a_job_without_float64_and_fused_optimizers_equals_one_with_them(flags, tmp_path, monkeypatch):
    expected = records(tmp_path, "cpu", flags, 4)
    monkeypatch.setitem(select._BACKENDS, "cpu", Device)
    with NoFloat64():
        found = records(tmp_path, "device", flags, 2, 4)
    assert len(found) == len(expected) == 4
    tolerance = 1e-2 if "fp16" in flags else 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("grad_norm", "params_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), key
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
        # An element may round to zero on one of the two.
        assert ours["num_zeros"] == pytest.approx(theirs["num_zeros"], abs=9)
        assert ours["loss_scale"] == theirs["loss_scale"]
