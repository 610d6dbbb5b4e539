"""A run that goes on from a foreign checkpoint with its optimizer: the same losses as the run that was not cut."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch
from support.deepspeed_files import write_deepspeed, write_universal
from support.interop_models import VOCAB
from support.megatron_files import arguments, read_state, with_adam, write_classic
from support.trainer import command, measured

from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.config.arguments import parse_run
from megatron_lite.errors import CheckpointError
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.train.job import train_job

pytestmark = pytest.mark.slow

SHAPE = (
    *("--num-layers", 4, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 32),
    *("--max-position-embeddings", 32, "--hidden-dropout", 0, "--attention-dropout", 0),
)
RUN = (
    *SHAPE,
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB - 1, "--device", "cpu"),
    *("--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 5, "--lr", 1e-2, "--min-lr", 1e-3),
    *("--lr-decay-style", "linear", "--lr-warmup-iters", 2, "--log-interval", 1, "--eval-iters", 0),
)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs of five iterations with a checkpoint after three; returns the folder."""
    made = {}

    def make(precision):
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("run") / "straight"
            words = ("train", *RUN, *precision, "--save", made[precision], "--save-schedule", "3", "--train-iters", 5)
            assert command(*words).code == 0
        return made[precision]

    return make


@pytest.fixture
def saved(runs):
    """State after three iterations, the model, and what iterations 4 and 5 measured."""

    def make(*precision):
        folder = runs(precision)
        path = folder / "iter_0000003"
        model = stored_model(read_manifest(path), path).model
        later = [record for record in measured(folder) if record["iteration"] > 3]
        assert [record["iteration"] for record in later] == [4, 5]
        return read_state(path), model, later

    return make


def goes_on(folder, tmp_path, *precision):
    """What iterations 4 and 5 measure when a run goes on from an imported checkpoint."""
    result = command("train", *RUN, *precision, "--load", folder, "--save", tmp_path / "on", "--save-interval", 5)
    assert result.code == 0, result.err
    assert "successfully loaded checkpoint" in result.out
    return measured(tmp_path / "on")


BF16, FP16 = ("--bf16",), ("--fp16", "--initial-loss-scale", 64)
CLASSIC = {
    "fp32": ((), {}, {}),
    "bf16, tp 2, pp 2": (BF16, {"tp": 2, "pp": 2}, {"vectors_first": True}),
    "fp16, core names": (FP16, {"pp": 2, "naming": "core"}, {"apex": True}),
    "fp32, version 0": ((), {"tp": 2, "version": 0}, {}),
}


@pytest.mark.parametrize("name", CLASSIC)
def test_classic(name, saved, imported, same, tmp_path):
    precision, layout, options = CLASSIC[name]
    state, model, expected = saved(*precision)
    if "--fp16" in precision:
        options = {**options, "scaler": {"scale": torch.tensor([64.0]), "growth_tracker": 3, "hysteresis_tracker": 2}}
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    naming = layout.get("naming", "legacy")
    args = arguments(model, tp, pp, naming != "legacy", consumed_train_samples=12)
    edit = with_adam(state, model, tp, pp, 3, naming, layout.get("version", 3.0), **options)
    write_classic(tmp_path / "m", state, model, args=args, iteration=3, edit=edit, **layout)
    report, source = imported(tmp_path / "m", tmp_path / "ck", "--vocab-size", str(VOCAB))
    assert report.goes_on
    same(source, state)
    assert source.tensors.keys() == state.keys()
    assert goes_on(tmp_path / "ck", tmp_path, *precision) == expected


def resume_on_rank(backend, words):
    config = parse_run(words, world_size=backend.world_size).config
    with ExitRecord(config.checkpoint.save, backend.launch) as record:
        train_job(config, record, started=time.monotonic(), backend=backend)


@pytest.mark.parametrize("source", ["megatron", "deepspeed"])
def test_another_layout_goes_on(source, saved, imported, on_ranks, tmp_path):
    """An optimizer that was saved by tp 2, pp 2 goes on as another layout, as exactly as layouts agree."""
    state, model, expected = saved()
    args = arguments(model, 2, 2, consumed_train_samples=12)
    if source == "megatron":
        edit = with_adam(state, model, 2, 2, 3)
        write_classic(tmp_path / "m", state, model, 2, 2, args=args, iteration=3, edit=edit)
    else:
        write_deepspeed(tmp_path / "m", state, model, 2, 2, dp=2, step=3, iteration=3, args=args)
    report, _ = imported(tmp_path / "m", tmp_path / "ck", "--vocab-size", str(VOCAB))
    assert report.goes_on
    for layout, ranks in (
        (("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2), 4),
        (("--use-distributed-optimizer",), 2),
    ):
        save = tmp_path / f"on {ranks} ranks"
        words = (*RUN, *layout, "--load", tmp_path / "ck", "--save", save, "--save-interval", 5)
        on_ranks(ranks, resume_on_rank, [str(word) for word in words])
        found = measured(save)
        assert [record["iteration"] for record in found] == [4, 5]
        for record, other in zip(found, expected, strict=True):
            assert record["losses"]["lm loss"] == pytest.approx(other["losses"]["lm loss"], rel=1e-5)
            assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("complete", [True, False])
def test_distributed_optimizer(complete, saved, imported, tmp_path):
    state, model, expected = saved(*BF16)
    beside = {}
    args = arguments(model, 2, 1, consumed_train_samples=12, use_distributed_optimizer=True)
    edit = with_adam(state, model, 2, 1, 3, distributed=beside)
    folder = write_classic(tmp_path / "m", state, model, 2, 1, args=args, iteration=3, edit=edit)
    for (rank, _), content in beside.items():
        if complete or rank == 0:
            torch.save(content, folder / f"mp_rank_{rank:02d}" / "distrib_optim.pt")
    if complete:
        imported(tmp_path / "m", tmp_path / "ck", "--vocab-size", str(VOCAB))
        assert goes_on(tmp_path / "ck", tmp_path, *BF16) == expected
        content[0][torch.bfloat16, torch.float32]["param"] = torch.zeros(5)
        torch.save(content, folder / "mp_rank_01" / "distrib_optim.pt")
    with pytest.raises(CheckpointError, match=r"distrib_optim\.pt.*--weights-only") as caught:
        imported(tmp_path / "m", tmp_path / "other", "--vocab-size", str(VOCAB))
    assert ("has 5 elements" in str(caught.value)) is complete
    report, source = imported(tmp_path / "m", tmp_path / "other", "--vocab-size", str(VOCAB), weights_only=True)
    assert not report.goes_on
    assert not any(name.startswith("optimizer.") for name in source.tensors)


@pytest.fixture
def scaler(monkeypatch):
    """DeepSpeed's dynamic loss scaler, under its name."""
    module = types.ModuleType("deepspeed.runtime.fp16.loss_scaler")
    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    module.DynamicLossScaler = type("DynamicLossScaler", (), {"__module__": module.__name__})
    made = module.DynamicLossScaler()
    vars(made).update(cur_scale=64.0, cur_iter=3, last_overflow_iter=-1, cur_hysteresis=2, scale_window=1000)
    return made


ZERO = {
    "plain, dp 3": (FP16, {"dp": 3}),
    "plain, tp 2, pp 2, dp 2": (FP16, {"dp": 2, "tp": 2, "pp": 2}),
    "bf16_, tp 2, pp 2": (BF16, {"dp": 1, "tp": 2, "pp": 2, "prefix": "bf16_"}),
    "bf16_, dp 4": (BF16, {"dp": 4, "prefix": "bf16_"}),
}


@pytest.mark.parametrize("name", ZERO)
def test_zero(name, saved, imported, same, scaler, tmp_path, monkeypatch):
    precision, layout = ZERO[name]
    state, model, expected = saved(*precision)
    args = arguments(model, layout.get("tp", 1), layout.get("pp", 1), consumed_train_samples=12)
    write_deepspeed(tmp_path / "ds", state, model, step=3, iteration=3, args=args, scaler=scaler, **layout)
    monkeypatch.undo()
    report, source = imported(tmp_path / "ds", tmp_path / "ck")
    assert report.goes_on
    same(source, state)
    assert source.tensors.keys() == state.keys()
    kind = read_manifest(source.path).scalars["engine"]["loss_scaler"]
    assert kind["kind"] == "deepspeed"
    assert kind["cur_iter"] == 3
    assert goes_on(tmp_path / "ck", tmp_path, *precision) == expected


def test_universal(saved, imported, tmp_path):
    state, model, expected = saved()
    args = arguments(model, consumed_train_samples=12)
    write_universal(tmp_path / "ds", state, model, args, step=3)
    report, source = imported(tmp_path / "ds", tmp_path / "ck")
    assert report.goes_on
    assert "optimizer.exp_avg.decoder.final_norm.bias" in source.tensors
    assert goes_on(tmp_path / "ck", tmp_path) == expected
