"""N iterations, kill -9, resume, M iterations: bit for bit equal to N + M iterations."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial

import pytest
from support.trainer import assert_same_run, checkpoints, command, die_in_save, iterations, measured

from megatron_lite.metrics.reporter import Reporter

pytestmark = pytest.mark.slow

# An odd save interval, so that some saves coincide with evaluations.
LONG = ("--train-iters", 12, "--save-interval", 3, "--eval-interval", 4)
DROPOUT = ("--hidden-dropout", 0.1, "--attention-dropout", 0.1)
RISING_DECAY = ("--weight-decay-incr-style", "cosine", "--start-weight-decay", 0.01, "--end-weight-decay", 0.3)
VARIANTS = {
    "dropout": (*LONG, *DROPOUT, "--lr-decay-style", "cosine", "--lr-warmup-iters", 4),
    "ramp-up": (*LONG, "--global-batch-size", 8, "--rampup-batch-size", 2, 2, 30),
    "samples": ("--train-samples", 50, "--lr-warmup-samples", 13, "--save-interval", 3, "--eval-interval", 4),
    "bf16": (*LONG, *DROPOUT, "--bf16", "--clip-grad", 0.5),
    # A loss scale that overflows a few times and grows twice, so that the state of the scaler matters.
    "fp16": (*LONG, "--fp16", "--initial-loss-scale", 2.0**22, "--loss-scale-window", 3, "--hysteresis", 2),
    "async": (*LONG, *DROPOUT, "--async-save"),
    "cyclic, masks": (*LONG, "--dataloader-type", "cyclic", "--reset-position-ids", "--reset-attention-mask"),
    "sgd": (*LONG, "--optimizer", "sgd", *RISING_DECAY),
}


def args_of(variant, corpus, folder):
    """Return the job of a variant that resumes from and saves to `folder`."""
    return corpus.job(*VARIANTS[variant], "--save", folder, "--load", folder)


def die_after(iteration):
    """Make the process kill itself with SIGKILL after an iteration, before evaluation and save."""
    report = Reporter.iteration

    def report_and_die(self, values):
        report(self, values)
        if values.iteration == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.iteration = report_and_die


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_between_saves_and_resumed(variant, corpus, start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*args_of(variant, corpus, whole)).code == 0
    args = args_of(variant, corpus, broken)
    for iteration in (5, 8):
        result = start(args, partial(die_after, iteration)).wait()
        assert result.code == -signal.SIGKILL, result.err
        assert iterations(broken) == list(range(1, iteration + 1))
    assert command(*args).code == 0
    assert_same_run(whole, broken)


def test_killed_at_random_moments_until_it_is_done(corpus, start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    many = ("--train-iters", 16, "--save-interval", 1, "--eval-interval", 7, *DROPOUT)
    assert command(*corpus.job(*many, "--save", whole)).code == 0
    draw = random.Random(1234)
    kills = 0
    for _ in range(4):
        job = start(corpus.job(*many, "--save", broken, "--load", broken))
        before = len(checkpoints(broken))
        # Every iteration saves, so most of these moments are during a save.
        if job.until(partial(_more_than, before, broken)):
            time.sleep(draw.uniform(0.0, 0.05))
            job.send(signal.SIGKILL)
        kills += job.wait().code == -signal.SIGKILL
    assert kills, "they all came too late"
    result = command(*corpus.job(*many, "--save", broken, "--load", broken))
    assert result.code == 0
    assert_same_run(whole, broken)
    assert checkpoints(broken) == [f"iter_{number:07d}" for number in range(1, 17)]


def _more_than(count, folder):
    return len(checkpoints(folder)) > count


@pytest.mark.parametrize("mode", [(), ("--async-save",)])
def test_killed_at_each_file_of_a_save(mode, corpus, start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ("--train-iters", 4, "--save-interval", 2, *mode)
    assert command(*corpus.job(*flags, "--save", whole)).code == 0
    args = corpus.job(*flags, "--save", broken, "--load", broken)
    deaths = 0
    for count in range(1, 20):
        result = start(args, partial(die_in_save, broken, count)).wait()
        if result.code == 0:
            break
        assert result.code == -signal.SIGKILL
        deaths += 1
    assert result.code == 0, "it never got through"
    assert deaths >= 6
    assert_same_run(whole, broken)
    assert checkpoints(broken) == ["iter_0000002", "iter_0000004"], "what the killed saves left is gone"


def test_blended_data_and_its_losses_by_source(corpus, start, tmp_path):
    one, two = corpus.data
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    blend = (*LONG, "--data-path", 0.3, one, 0.7, two)
    assert command(*corpus.job(*blend, "--save", whole)).code == 0
    args = corpus.job(*blend, "--save", broken, "--load", broken)
    assert start(args, partial(die_after, 7)).wait().code == -signal.SIGKILL
    assert command(*args).code == 0
    assert_same_run(whole, broken)
    names = {name for record in measured(whole) for name in record["losses"]}
    assert {f"lm loss {one.name}", f"lm loss {two.name}"} < names
