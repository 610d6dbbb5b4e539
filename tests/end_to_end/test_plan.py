"""A plan against what a toy run does: iterations, samples, tokens, saves and the bytes of their tensors."""

import json
from math import prod
from pathlib import Path

import pytest
from support.trainer import checkpoints, command, measured, records

from megatron_lite.runs.manifest import read_manifest

pytestmark = pytest.mark.slow
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


VARIANTS = {
    "fp32": (),
    "bf16, average": ("--bf16", "--ema-decay", "0.9"),
    "muon": ("--optimizer", "muon", "--freeze", "embedding"),
    "adafactor": ("--optimizer", "adafactor", "--bf16"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_as_planned(variant, corpus, tmp_path):
    args = corpus.job(
        *("--train-samples", 50, "--global-batch-size", 8, "--rampup-batch-size", 2, 2, 20, "--eval-interval", 4),
        *("--seq-length-warmup", "8:6:8", "--save", tmp_path, "--save-schedule", "2:4 3", "--keep-last", 2),
        *("--weights-only-every", 5, *VARIANTS[variant]),
    )
    planned = command("plan", "--json", *args[1:], "--gpu", "cpu")
    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    result = command(*args)
    assert result.code == 0, result.err

    done = [record for record in measured(tmp_path) if record["kind"] == "iteration"]
    assert len(done) == plan["time"]["iterations"]
    assert done[-1]["consumed_train_samples"] == plan["time"]["samples"]
    assert done[-1]["consumed_train_tokens"] == plan["time"]["tokens"]
    for stage in plan["time"]["stages"]:
        for record in done[stage["first_iteration"] - 1 : stage["last_iteration"]]:
            assert (record["global_batch_size"], record["seq_length"]) == (stage["global_batch"], stage["seq_length"])

    disk = plan["disk"]
    saves = [record for record in records(tmp_path) if record["kind"] == "save"]
    assert len(saves) == disk["saves"] + disk["weights_only"]
    assert len(checkpoints(tmp_path)) in (disk["kept"], disk["kept"] - 1)
    for name in checkpoints(tmp_path):
        assert tensor_bytes(tmp_path / name) == disk["checkpoint"]
    for name in checkpoints(tmp_path / "weights"):
        assert tensor_bytes(tmp_path / "weights" / name) == disk["weights"]


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(prod(tensor.shape) * BYTES[tensor.dtype] for tensor in read_manifest(folder).tensors.values())
