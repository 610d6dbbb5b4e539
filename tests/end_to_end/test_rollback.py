"""Loss spikes and rollback: detection, report, excluded samples, equality with a run without these samples."""

from __future__ import annotations

import json
import math
import shutil
import time
from contextlib import contextmanager
from unittest import mock

import pytest
from support.pending_step import Changed
from support.trainer import assert_same_run, checkpoints, command, iterations, measured, records, status

from megatron_lite.config.arguments import parse_run
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.train.batches import RunData
from megatron_lite.train.job import train_job
from megatron_lite.train.native import NativeEngine

pytestmark = pytest.mark.slow

JOB = ("--train-iters", 20, "--save-interval", 4, "--eval-interval", 10, "--seed", 5)
SPIKES = ("--spike-factor", 2, "--spike-patience", 2)
BAD = range(44, 52)
"""Places of the samples of iterations 12 and 13, which get high losses."""


@contextmanager
def spoiled():
    """Make the loss of bad samples high; return the places trained on, one list per iteration."""
    places = []
    reader, step = RunData.train_reader, NativeEngine.train_step

    def note(self, plan):
        places.append(self.train.positions(plan.first_sample, plan.global_batch))
        return reader(self, plan)

    def spoil(self, plan, read, rates):
        pending = step(self, plan, read, rates)
        return Changed(pending, loss=lambda outcome: outcome.loss * 5) if set(places[-1]) & set(BAD) else pending

    with mock.patch.object(RunData, "train_reader", note), mock.patch.object(NativeEngine, "train_step", spoil):
        yield places


@pytest.fixture
def seen():
    with spoiled() as places:
        yield places


def test_a_spike_is_reported_and_a_rollback_excludes_its_samples(corpus, seen, tmp_path):
    save, board = tmp_path / "run", tmp_path / "board"
    args = corpus.job(*JOB, *SPIKES, "--save", save, "--load", save, "--tensorboard-dir", board)
    result = command(*args, "--keep-last", 1)
    assert result.code == 0, result.err
    (told,) = [record["text"] for record in records(save) if "loss spike" in str(record.get("text"))]
    assert "in iterations 12 to 13" in told
    assert "trained on samples 40 to 51" in told
    # The last checkpoint and those around the spike are kept.
    assert checkpoints(save) == ["iter_0000008", "iter_0000016", "iter_0000020"]
    assert f"megatron-lite rollback {save} --to 8 --skip-samples 40-51" in result.out

    result = command("rollback", save, "--to", 8, "--skip-samples", "40-51")
    assert result.code == 0, result.err
    assert checkpoints(save) == ["iter_0000008"]
    assert checkpoints(save / "rolled-back-1") == ["iter_0000016", "iter_0000020"]
    assert iterations(save) == list(range(1, 9))
    assert read_manifest(save / "iter_0000008").provenance.skipped_samples == ((40, 52),)
    assert command("checkpoint", "verify", save).code == 0
    assert steps(board) == {"lm loss": list(range(1, 9)), "lm loss vs samples": list(range(4, 33, 4))}

    # 9 iterations consume 36 samples; the tenth starts after the excluded samples.
    shown = command("data", "samples", "--iteration", 11, *args[1:])
    assert [line.split()[1] for line in shown.out.splitlines() if line.startswith("sample ")] == [
        "52",
        "53",
        "54",
        "55",
    ]
    seen.clear()
    assert command(*args).code == 0
    assert [place for places in seen for place in places] == [*range(32, 40), *range(52, 92)]
    assert iterations(save) == list(range(1, 21))
    assert read_manifest(save / "iter_0000020").provenance.skipped_samples == ((40, 52),)
    assert not [record for record in records(save) if "loss spike" in str(record.get("text"))]
    assert [match["text"] for match in discarded(save)["spikes"]] == [told]


def discarded(save):
    return next(record for record in records(save) if record["kind"] == "discarded")


def steps(board):
    """Return the steps of two tags in the TensorBoard files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in ("lm loss", "lm loss vs samples")}


@pytest.mark.parametrize("mode", [(), ("--async-save",)])
def test_automatic_rollback(corpus, seen, tmp_path, mode):
    save, by_hand = tmp_path / "run", tmp_path / "hand"
    args = (*corpus.job(*JOB, *mode), "--auto-rollback", 1, *SPIKES)
    result = command(*args, "--save", save)
    assert result.code == 0, result.err
    assert "rolling back to iteration 8, skipping samples 40 to 51 (rollback 1 of at most 1)" in result.out
    trained = [place for places in seen for place in places]
    # The spike is found while the next iteration is in flight, which is discarded.
    assert trained == [*range(56), *range(32, 40), *range(52, 92)]
    assert checkpoints(save) == [f"iter_{number:07d}" for number in (4, 8, 12, 16, 20)]
    assert iterations(save) == list(range(1, 21))
    assert "in iterations 12 to 13" in discarded(save)["spikes"][0]["text"]
    starts = [record["after_rollback"] for record in records(save) if record["kind"] == "start"]
    assert starts == [False, True]

    # The same with manual rollbacks, between two jobs.
    stopped = corpus.job(*JOB, "--save", by_hand, "--load", by_hand)
    assert command(*stopped, "--exit-interval", 8).code == 0
    assert command("rollback", by_hand, "--to", 8, "--skip-samples", "40-51").code == 0
    assert command(*stopped).code == 0
    assert measured(save) == measured(by_hand)


def spoiled_job(backend, args):
    """Run a job on one rank whose loss is high for bad samples of any replica; return the places trained on."""
    config = parse_run(args, world_size=backend.world_size).config
    with spoiled() as places, ExitRecord(config.checkpoint.save, backend.launch) as record:
        train_job(config, record, started=time.monotonic(), backend=backend)
    return [place for batch in places for place in batch]


@pytest.mark.parametrize(
    "layout",
    [
        ("--async-save", "--use-distributed-optimizer"),
        ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
        ("--pipeline-model-parallel-size", 2),
    ],
    ids=["dp2", "tp2", "pp2"],
)
def test_automatic_rollback_on_several_ranks(layout, corpus, on_ranks, tmp_path):
    def job(save, *more):
        return [str(word) for word in corpus.job(*JOB, *layout, "--save", save, "--load", save, *more)[1:]]

    save, by_hand = tmp_path / "run", tmp_path / "hand"
    trained = on_ranks(2, spoiled_job, job(save, *SPIKES, "--auto-rollback", 1))
    assert trained == [[*range(52), *range(32, 40), *range(52, 92)]] * 2
    assert iterations(save) == list(range(1, 21))
    assert checkpoints(save) == [f"iter_{number:07d}" for number in (4, 8, 12, 16, 20)]
    assert checkpoints(save / "rolled-back-1") == ["iter_0000012"]
    assert read_manifest(save / "iter_0000020").provenance.skipped_samples == ((40, 52),)
    assert (status(save)["status"], status(save)["iteration"], status(save)["saved_iteration"]) == ("completed", 20, 20)

    on_ranks(2, spoiled_job, job(by_hand, "--exit-interval", 8))
    assert command("rollback", by_hand, "--to", 8, "--skip-samples", "40-51").code == 0
    assert on_ranks(2, spoiled_job, job(by_hand)) == [[*range(32, 40), *range(52, 92)]] * 2
    assert_same_run(save, by_hand)


def test_samples_of_a_nan_loss_are_excluded(corpus, seen, monkeypatch, tmp_path):
    save, step = tmp_path / "run", NativeEngine.train_step

    def spoil(self, plan, read, rates):
        pending = step(self, plan, read, rates)
        changes = {"loss": lambda outcome: math.nan, "finite": lambda outcome: False}
        return Changed(pending, **changes) if set(seen[-1]) & set(BAD) else pending

    monkeypatch.setattr(NativeEngine, "train_step", spoil)
    args = (*corpus.job(*JOB), "--save", save, "--spike-factor", 2)
    result = command(*args, "--auto-rollback", 2)
    assert result.code == 0, result.err
    # Each time, the iteration and the one before.
    assert "rolling back to iteration 8, skipping samples 40 to 47 (rollback 1 of at most 2)" in result.out
    assert "rolling back to iteration 8, skipping samples 36 to 51 (rollback 2 of at most 2)" in result.out
    assert iterations(save) == list(range(1, 21))
    assert read_manifest(save / "iter_0000020").provenance.skipped_samples == ((36, 52),)
    shutil.rmtree(save)
    result = command(*args)
    assert result.code == 1
    assert "has loss" in result.err


def test_a_spike_is_found_across_two_jobs(corpus, seen, tmp_path):
    save = tmp_path / "run"
    args = (*corpus.job(*JOB), "--save", save, "--load", save, *SPIKES, "--keep-last", 1)
    assert command(*args, "--exit-interval", 12).code == 0
    # The last iteration may be the start of a spike: the checkpoint before it is kept.
    assert checkpoints(save) == ["iter_0000008", "iter_0000012"]
    result = command(*args)
    assert "in iterations 12 to 13" in result.out
    assert checkpoints(save) == ["iter_0000008", "iter_0000016", "iter_0000020"]


def test_automatic_rollbacks_are_counted_over_all_jobs(corpus, seen, tmp_path):
    save = tmp_path / "run"
    args = (*corpus.job(*JOB), "--save", save, "--load", save, *SPIKES, "--auto-rollback", 1)
    save.mkdir()
    (save / "rollbacks.jsonl").write_text(json.dumps({"automatic": True}) + "\n", encoding="utf-8")
    result = command(*args)
    assert result.code == 0, result.err
    assert "the 1 rollbacks of --auto-rollback are used up" in result.out
    assert "rollback 1 of" not in result.out


def test_invalid_rollbacks_are_errors(corpus, tmp_path):
    save = tmp_path / "run"
    assert command(*corpus.job("--train-iters", 6, "--save-interval", 3, "--save", save)).code == 0
    before = (save / "iter_0000003" / "manifest.json").read_bytes()
    for args, text in (
        (("--to", 4), "complete checkpoints in"),
        (("--to", 3, "--skip-samples", "8-20"), "was saved at sample 12"),
        (("--to", 3, "--skip-samples", "20-8"), "is not a range of samples"),
    ):
        result = command("rollback", save, *args)
        assert result.code == 1
        assert text in result.err
    assert checkpoints(save) == ["iter_0000003", "iter_0000006"]
    assert (save / "iter_0000003" / "manifest.json").read_bytes() == before
    # A repeated command is no error: the first may have been killed.
    for _ in range(2):
        assert command("rollback", save, "--to", 3, "--skip-samples", "12-15").code == 0
    assert read_manifest(save / "iter_0000003").provenance.skipped_samples == ((12, 16),)


def test_a_weights_only_rollback(corpus, tmp_path):
    save, other = tmp_path / "run", tmp_path / "other"
    options = ("--train-iters", 6, "--save-interval", 6, "--weights-only-every", 2, "--bf16")
    assert command(*corpus.job(*options, "--save", save, "--async-save")).code == 0
    assert command(*corpus.job(*options, "--save", other)).code == 0
    for folder in (save, other):
        assert checkpoints(folder / "weights") == [f"iter_{number:07d}" for number in (2, 4, 6)]
        assert checkpoints(folder) == ["iter_0000006"]
    names = read_manifest(save / "weights" / "iter_0000006").tensors
    assert names and not [name for name in names if name.startswith("optimizer.")]
    assert command("checkpoint", "verify", save / "weights").code == 0
    job = corpus.job("--train-iters", 2, "--bf16", "--load", save / "weights")
    assert command(*job, "--finetune").code == 0
    assert command(*job).code == 1
    shutil.rmtree(save / "weights" / "iter_0000006")


def test_stopping_without_a_save(corpus, tmp_path):
    save = tmp_path / "run"
    args = corpus.job("--train-iters", 8, "--save-interval", 3, "--save", save, "--load", save)
    assert command(*args, "--no-save-on-exit", "--exit-interval", 4).code == 0
    assert checkpoints(save) == ["iter_0000003"]
    assert command(*args, "--exit-interval", 5).code == 0
    assert checkpoints(save) == ["iter_0000003", "iter_0000005"]
    assert command(*args, "--no-save-on-exit").code == 0
    assert checkpoints(save)[-1] == "iter_0000008"
