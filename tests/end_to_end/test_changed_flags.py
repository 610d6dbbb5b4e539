"""Runs resumed with another length, batch, layout or evaluation: every sample is read once and in order."""

from __future__ import annotations

import dataclasses
import re
from contextlib import contextmanager
from unittest import mock

import pytest
from support.trainer import command, iterations, measured

from megatron_lite.config.arguments import parse_run
from megatron_lite.data.serving.build import plan_datasets
from megatron_lite.runs.manifest import MANIFEST_NAME, encode_manifest, read_manifest
from megatron_lite.train.assemble import assembled
from megatron_lite.train.batches import RunData
from megatron_lite.train.loop import train

pytestmark = pytest.mark.slow

# A small epoch; each job saves its last iteration.
BASE = ("--lr-decay-style", "constant", "--save-interval", 500, "--split", "20,60,20")


@contextmanager
def watched():
    """Record the dataset positions of the samples of each iteration."""
    read, original = {}, RunData.train_reader

    def note(self, plan):
        numbers = self.train.samples(plan.first_sample, plan.global_batch)
        read[plan.iteration] = [tuple(self.train.dataset.spans(number)) for number in numbers]
        return original(self, plan)

    with mock.patch.object(RunData, "train_reader", note):
        yield read


def go_on(corpus, save, *args, data=None):
    """Run a job that resumes from and saves to `save`; return its output."""
    args = (*BASE, "--save", save, "--load", save, *args)
    result = command(*corpus.job(*args, data=data))
    assert result.code == 0, result.err
    return result.out


def shown(corpus, save, iteration, *args, data=None):
    """Return the samples of an iteration as shown by `data samples`: (sequence, first token) of each span."""
    args = corpus.job(*BASE, "--save", save, "--load", save, *args, data=data)[1:]
    result = command("data", "samples", "--iteration", iteration, *args)
    assert result.code == 0, result.err
    return re.findall(r"sequence ([\d,]+), tokens ([\d,]+) to", result.out)


def places(samples):
    return [(f"{sequence:,}", f"{start:,}") for sample in samples for _, (sequence, start, _) in sample]


def tokens(samples):
    """Return the dataset positions of the input tokens of samples; the last token of a sample is only a label."""
    every = []
    for sample in samples:
        places = [
            (path, number, token) for path, (number, start, count) in sample for token in range(start, start + count)
        ]
        every += places[:-1]
    return every


def repeats(samples):
    """Return the number of tokens read more than once."""
    return len(tokens(samples)) - len(set(tokens(samples)))


def damage(checkpoint):
    """Flip a bit in each tensor file."""
    for file in checkpoint.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def epoch_of(corpus, *args, data=None):
    """Return the samples of one epoch of the training data."""
    config = parse_run([str(word) for word in corpus.job("--train-iters", 1, *BASE, *args, data=data)[1:]]).config
    return int(plan_datasets(config)["train"]["train"].sources[0].epoch_samples)


def test_changed_evaluations_continue_at_the_consumed_position(corpus, tmp_path):
    save = tmp_path / "run"
    go_on(corpus, save, "--train-iters", 15, "--eval-interval", 1, "--eval-iters", 30, "--exit-interval", 10)
    go_on(corpus, save, "--train-iters", 15, "--eval-interval", 4, "--eval-iters", 30)
    assert iterations(save) == list(range(1, 16))
    validated = [record["iteration"] for record in measured(save) if record["kind"] == "validation"]
    assert validated == [*range(1, 11), 12, 15, 15]
    ended = [record["losses"] for record in measured(save) if record.get("at_end")]
    for args in (("--train-iters", 15), ()):
        job = corpus.job(*args, *BASE[-2:], "--eval-iters", 30, "--load", save, "--skip-train")
        again = command(*job)
        assert again.code == 0, again.err
        assert all(f"{loss:.6E}" in again.out for losses in ended for loss in losses.values())


@pytest.mark.parametrize("args", [("--sample-order", order) for order in ("legacy", "modern", "closed-form")])
def test_a_longer_run_finishes_its_epoch_before_repeating_samples(args, corpus, tmp_path):
    save, epoch = tmp_path / "run", epoch_of(corpus)
    short, long = epoch // 8, epoch // 2
    with watched() as read:
        assert "keep their order" not in go_on(corpus, save, "--train-iters", short, *args)
        before = {iteration: list(samples) for iteration, samples in read.items()}
        assert "keep their order" in go_on(corpus, save, "--train-iters", long, *args)
    assert sorted(read) == list(range(1, long + 1))
    first = [sample for iteration in range(1, long + 1) for sample in read[iteration]][: epoch - 1]
    assert repeats(first) == 0
    rest = [sample for iteration in range(1, long + 1) for sample in read[iteration]][epoch:]
    assert rest[:8] != first[:8], "the next epoch has another order"
    # Iterations of both jobs are shown as they were read, under the flags of either and under later ones.
    for flags in (("--train-iters", short), ("--train-iters", long), ("--train-iters", 3 * long)):
        for iteration in (2, short, short + 1, long):
            assert shown(corpus, save, iteration, *flags, *args) == places(read[iteration])
    assert before.items() <= read.items()


def test_a_longer_run_of_a_blend_repeats_none_of_its_sources(corpus, tmp_path):
    blend = ("--data-path", 0.3, corpus.data[0], 0.7, corpus.data[1])
    save, epoch = tmp_path / "run", epoch_of(corpus)
    with watched() as read:
        go_on(corpus, save, "--train-iters", epoch // 16, *blend)
        go_on(corpus, save, "--train-iters", epoch // 2, *blend)
    samples = [sample for batch in read.values() for sample in batch]
    for path in corpus.data:
        of_source = [sample for sample in samples if sample[0][0] == str(path)]
        assert len(of_source) > epoch / 2
        assert repeats(of_source[: epoch_of(corpus, data=path) - 1]) == 0


def test_an_interrupted_run_reads_the_samples_of_an_uninterrupted_one(corpus, tmp_path):
    args = ("--train-iters", 60, "--eval-interval", 7)
    with watched() as whole:
        go_on(corpus, tmp_path / "whole", *args)
    with watched() as parts:
        for end in (10, 40, 1000):
            go_on(corpus, tmp_path / "parts", *args, "--exit-interval", end)
    assert parts == whole
    history = read_manifest(tmp_path / "parts" / "iter_0000060").provenance.data_history
    assert [segment.train_requests for segment in history] == [(240,)]


@pytest.mark.parametrize(
    "change",
    [
        ("--global-batch-size", 8),
        ("--global-batch-size", 16, "--rampup-batch-size", 4, 4, 200),
        ("--global-batch-size", 6, "--micro-batch-size", 3),
    ],
)
def test_a_larger_batch_after_a_resume_reads_the_next_samples(change, corpus, tmp_path):
    save, epoch = tmp_path / "run", epoch_of(corpus)
    end = epoch // 4
    with watched() as read:
        go_on(corpus, save, "--train-iters", end, "--exit-interval", end // 2)
        go_on(corpus, save, "--train-iters", end, *change)
        samples = [sample for iteration in range(1, end + 1) for sample in read[iteration]][: epoch - 1]
        assert repeats(samples) == 0
        for iteration in (3, end // 2 + 2, end):
            assert shown(corpus, save, iteration, "--train-iters", end, "--micro-batch-size", 1) == places(
                read[iteration]
            )


def test_samples_are_shown_without_the_deleted_checkpoints(corpus, tmp_path):
    save = tmp_path / "run"
    with watched() as read:
        go_on(corpus, save, "--train-iters", 10)
        go_on(corpus, save, "--train-iters", 20, "--global-batch-size", 8, "--keep-last", 1)
    for iteration in (4, 11, 17):
        assert shown(corpus, save, iteration, "--train-iters", 20, "--global-batch-size", 2) == places(read[iteration])


def test_a_checkpoint_without_data_history_keeps_the_order_of_the_job_that_saved_it(corpus, tmp_path):
    """Checkpoints of earlier versions: the requested sample counts follow from their configuration."""
    save, epoch = tmp_path / "run", epoch_of(corpus)
    args = ("--train-iters", epoch // 8)
    with watched() as read:
        go_on(corpus, save, *args)
        path = save / f"iter_{epoch // 8:07d}"
        manifest = read_manifest(path)
        provenance = dataclasses.replace(manifest.provenance, data_history=())
        (path / MANIFEST_NAME).write_bytes(encode_manifest(dataclasses.replace(manifest, provenance=provenance)))
        assert shown(corpus, save, 3, *args) == places(read[3])
        go_on(corpus, save, "--train-iters", epoch // 4)
    samples = [sample for batch in read.values() for sample in batch][: epoch - 1]
    assert repeats(samples) == 0


def test_a_changed_data_order_is_reported_with_its_repeated_samples(corpus, tmp_path):
    save, epoch = tmp_path / "run", epoch_of(corpus)
    half = epoch // 8
    with watched() as read:
        go_on(corpus, save, "--train-iters", half)
        args = corpus.job(*BASE, "--save", save, "--load", save, "--seed", 9)
        refused = command(*args, "--train-iters", 2 * half)
        assert refused.code == 1
        assert "keep their order" not in refused.out
        share = int(re.search(r"about (\d+)% of what is read next has been read before", refused.err)[1])
        assert share == pytest.approx(100 * 4 * half / epoch, abs=1)
        told = go_on(corpus, save, "--train-iters", 2 * half, "--seed", 9, "--accept-changed", "data")
        assert f"about {share}% of what is read next" in told
        assert "keep their order" not in told
        before, after = (
            [token for iteration in range(first, first + half) for token in tokens(read[iteration])]
            for first in (1, half + 1)
        )
        seen = set(before)
        assert sum(token in seen for token in after) / len(after) == pytest.approx(share / 100, abs=0.15)
        # Iterations before the change are shown in the order in which they were read.
        for iteration in (2, half + 2):
            assert shown(corpus, save, iteration, "--train-iters", 2 * half, "--seed", 9) == places(read[iteration])


def samples_on(backend, args):
    """Train on one rank; return the sample numbers of each iteration."""
    read, original = [], RunData.train_reader

    def note(self, plan):
        read.append(self.train.samples(plan.first_sample, plan.global_batch))
        return original(self, plan)

    config = parse_run(args, world_size=backend.world_size).config
    with mock.patch.object(RunData, "train_reader", note), assembled(config, backend) as run:
        train(run)
    return [number for numbers in read for number in numbers]


def test_the_cyclic_order_is_kept_on_another_number_of_replicas(corpus, on_ranks, tmp_path):
    def job(*more):
        args = corpus.job(*BASE, "--save", tmp_path, "--load", tmp_path, *more)
        return [str(word) for word in (*args[1:], "--dataloader-type", "cyclic", "--eval-iters", 0)]

    epoch = epoch_of(corpus)
    first = on_ranks(1, samples_on, job("--train-iters", epoch // 8))[0]
    second = on_ranks(2, samples_on, job("--train-iters", epoch // 4 - 1))
    assert second[0] == second[1]
    assert len(set(first + second[0])) == len(first) + len(second[0])


def test_a_fallback_to_before_a_change_reads_the_right_samples(corpus, tmp_path):
    save = tmp_path / "run"
    go_on(corpus, save, "--train-iters", 20, "--exit-interval", 10)
    go_on(corpus, save, "--train-iters", 20, "--global-batch-size", 8, "--exit-interval", 15)
    damage(save / "iter_0000015")
    with watched() as read:
        go_on(corpus, save, "--train-iters", 100, "--global-batch-size", 8, "--fallback-on-corrupt")
    assert sorted(read) == list(range(11, 101))
    history = read_manifest(save / "iter_0000100").provenance.data_history
    assert [(segment.iteration, segment.train_requests) for segment in history] == [
        (0, (80,)),
        (10, (80, 40 + 90 * 8)),
    ]


def test_a_fallback_keeps_the_samples_excluded_by_a_rollback(corpus, tmp_path):
    save = tmp_path / "run"
    go_on(corpus, save, "--train-iters", 12, "--save-interval", 4)
    assert command("rollback", save, "--to", 4, "--skip-samples", "24-27").code == 0
    go_on(corpus, save, "--train-iters", 12, "--save-interval", 4, "--exit-interval", 8)
    damage(save / "iter_0000008")
    places = []
    read = RunData.train_reader

    def note(self, plan):
        places.extend(self.train.positions(plan.first_sample, plan.global_batch))
        return read(self, plan)

    with mock.patch.object(RunData, "train_reader", note):
        go_on(corpus, save, "--train-iters", 12, "--fallback-on-corrupt")
    assert places == [*range(16, 24), *range(28, 52)]


def test_validation_sets_without_weights_restart_at_their_end(corpus, tmp_path):
    one, two = corpus.data
    sets = ("--train-data-path", one, "--valid-data-path", one, two)
    args = [
        word
        for word in corpus.job(*BASE[:2], "--train-iters", 2, "--eval-iters", 1000)
        if word not in (one, "--data-path", "--split", "80,10,10")
    ]
    result = command(*args, *sets)
    assert result.code == 0, result.err
