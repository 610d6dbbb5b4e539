"""Non-finite losses and gradients: fp16 skips the step, bf16 and fp32 stop, --no-check-for-nan… continues."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from support.checkpoints import read_tensor
from support.trainer import checkpoints, command, measured, records, status

from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.model.gpt import GPTStage
from megatron_lite.runs.manifest import read_manifest

pytestmark = pytest.mark.slow

# The third step moves the parameters so far that the fourth loss is not finite.
DIVERGING = ("--lr", 1e37, "--lr-decay-style", "constant", "--lr-warmup-iters", 2, "--clip-grad", 0)
RUN = ("--train-iters", 8, "--save-interval", 1, "--eval-interval", 100)


@pytest.mark.parametrize("precision", [(), ("--bf16",)])
def test_fp32_and_bf16_stop_with_iteration_and_samples(precision, corpus, tmp_path):
    save = tmp_path / "run"
    result = command(*corpus.job(*RUN, *DIVERGING, *precision, "--save", save))
    assert result.code == 1
    assert "Traceback" not in result.err
    found = re.search(r"TrainingError: Iteration (\d+) has loss (\S+) .*, on samples (\d+) to (\d+)\b", result.err)
    assert found, result.err
    iteration = int(found[1])
    assert not math.isfinite(float(found[2]))
    assert (int(found[3]), int(found[4])) == (4 * iteration - 4, 4 * iteration - 1)
    assert f"--skip-train-iteration-range {iteration}-{iteration}" in result.err
    assert f"data samples --iteration {iteration}`" in result.err
    assert checkpoints(save)[-1] == f"iter_{iteration - 1:07d}", "what is broken was not saved"
    ended = status(save)
    assert (ended["status"], ended["iteration"], ended["rank"]) == ("error", iteration - 1, 0)
    assert [record["iteration"] for record in measured(save)] == list(range(1, iteration))


def test_the_command_that_the_message_names_shows_the_samples(corpus):
    args = corpus.job(*RUN, *DIVERGING)
    iteration = re.search(r"data samples --iteration (\d+)", command(*args).err)[1]
    result = command("data", "samples", "--iteration", iteration, *args[1:])
    assert result.code == 0
    assert f"samples {4 * int(iteration) - 4} to {4 * int(iteration) - 1}" in result.out


def test_training_continues_without_the_check(corpus, tmp_path):
    save = tmp_path / "run"
    result = command(*corpus.job(*RUN, *DIVERGING, "--no-check-for-nan-in-loss-and-grad", "--save", save))
    assert result.code == 0
    losses = [record["losses"]["lm loss"] for record in measured(save) if record["kind"] == "iteration"]
    assert len(losses) == 8
    assert losses[-1] == "NaN"
    assert "number of nan iterations:   1 |" in result.out


def poison(forward, iteration):
    """Make the output of GPTStage.forward infinite in one iteration."""
    calls = []

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(self.training)
        return out * math.inf if self.training and (sum(calls) - 1) // 2 == iteration - 1 else out

    return poisoned


def test_an_iteration_can_be_skipped(corpus, tmp_path, monkeypatch):
    """The fix in the message: resume from the last checkpoint and skip the iteration."""
    save = tmp_path / "run"
    args = corpus.job(*RUN, "--save", save, "--load", save)
    with monkeypatch.context() as patch:
        patch.setattr(GPTStage, "forward", poison(GPTStage.forward, 4))
        assert "Iteration 4 has loss" in command(*args).err
    result = command(*args, "--skip-train-iteration-range", "4-4")
    assert result.code == 0
    assert "Skipped iteration 4 due to --skip-train-iteration-range" in result.out
    assert "skipped samples:            4 |" in result.out
    iterations = [record for record in measured(save) if record["kind"] == "iteration"]
    assert [record["iteration"] for record in iterations] == [1, 2, 3, 5, 6, 7, 8]
    assert iterations[3]["consumed_train_samples"] == 20


def test_fp16_skips_and_reports_an_overflow(corpus, tmp_path, monkeypatch):
    save = tmp_path / "run"
    monkeypatch.setattr(GPTStage, "forward", poison(GPTStage.forward, 4))
    args = ("--fp16", "--initial-loss-scale", 1024, "--hysteresis", 1, "--lr", 1e-3, "--lr-decay-style", "linear")
    result = command(*corpus.job(*RUN, *args, "--save", save))
    assert result.code == 0
    told = [record["text"] for record in records(save) if record["kind"] == "message"]
    assert [text for text in told if "overflowed" in text] == [
        "iteration 4: the gradients overflowed in fp16 at a loss scale of 1024, so its step is skipped"
    ]
    iterations = [record for record in measured(save) if record["kind"] == "iteration"]
    assert [record["skipped"] for record in iterations] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert [record["loss_scale"] for record in iterations] == [1024.0] * 4 + [512.0] * 4
    assert result.out.count("number of skipped iterations:   1 |") == 1
    # The schedule stands still, and the parameters are those of the iteration before.
    assert iterations[3]["learning_rate"] == iterations[2]["learning_rate"]
    before, after = (read_weights(save / name) for name in ("iter_0000003", "iter_0000004"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def read_weights(checkpoint):
    manifest = read_manifest(checkpoint)
    return {name: read_tensor(checkpoint, name) for name in manifest.tensors}


def test_fp16_finds_its_scale_from_the_default_one(corpus, tmp_path):
    result = command(*corpus.job("--fp16", "--train-iters", 40, "--save", tmp_path / "run", "--save-interval", 40))
    assert result.code == 0
    iterations = [record for record in measured(tmp_path / "run") if record["kind"] == "iteration"]
    skipped = [record["skipped"] for record in iterations]
    assert skipped == sorted(skipped, reverse=True), "first it skips, then it trains"
    assert 3 < sum(skipped) < 30
    assert iterations[-1]["losses"]["lm loss"] < iterations[0]["losses"]["lm loss"]


def test_fp16_that_is_beyond_help_says_that_it_has_diverged(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(GPTStage, "forward", lambda *args, forward=GPTStage.forward: forward(*args) * math.inf)
    args = ("--fp16", "--initial-loss-scale", 4, "--hysteresis", 1, "--train-iters", 4)
    told = [line for line in command(*corpus.job(*args)).out.splitlines() if "overflowed" in line]
    assert ["has diverged" in line for line in told] == [False, False, True, True]


def test_a_corrupted_weight_is_met_at_the_first_iteration(corpus, tmp_path):
    """As after a bad disk or a bad conversion: the checkpoint is whole, and holds a NaN."""
    from megatron_lite.checkpoint.save import save_checkpoint

    save, poisoned = tmp_path / "run", tmp_path / "poisoned"
    assert command(*corpus.job(*RUN, "--exit-after-iters", 2, "--save", save)).code == 0
    shutil.copytree(save, poisoned)
    corrupt(poisoned / "iter_0000002", save_checkpoint)
    result = command(*corpus.job(*RUN, "--load", poisoned))
    assert result.code == 1
    assert "Iteration 3 has loss nan" in result.err


def corrupt(checkpoint, save_checkpoint):
    from megatron_lite.backend.group import LocalGroup
    from megatron_lite.parallel.tensors import GlobalTensor, Piece

    manifest = read_manifest(checkpoint)
    tensors = []
    for name in manifest.tensors:
        value = read_tensor(checkpoint, name)
        if name == "decoder.layers.1.mlp.fc1.weight":
            value[0, 0] = math.nan
        tensors.append(GlobalTensor(name, tuple(value.shape), value.dtype, [Piece((0,) * value.dim(), value)]))
    save_checkpoint(
        SaveRequest(checkpoint.parent, manifest.iteration, manifest.scalars, manifest.provenance),
        tensors,
        LocalGroup("world"),
    )
