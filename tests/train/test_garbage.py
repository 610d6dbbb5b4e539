"""Garbage collection during training: objects of the start are frozen, collections have fixed iterations."""

import gc

import pytest
from support.trainer import make_corpus

from megatron_lite.cli.main import main
from megatron_lite.train.native import NativeEngine


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "times"), [(2, [2, 4]), (0, [])])
def test_collections_have_fixed_iterations(interval, times, tmp_path, monkeypatch):
    collected, iterations, step, collect = [], [], NativeEngine.train_step, gc.collect

    def train_step(self, plan, read, rates):
        iterations.append(plan.iteration)
        assert gc.isenabled() is (interval == 0) and gc.get_freeze_count() > 1000
        return step(self, plan, read, rates)

    def note(*args):
        collected.append(iterations[-1] if iterations else 0)
        return collect(*args)

    monkeypatch.setattr(NativeEngine, "train_step", train_step)
    monkeypatch.setattr(gc, "collect", note)
    job = make_corpus(tmp_path).job("--train-iters", 5, "--manual-gc-interval", interval, "--eval-iters", 0)
    assert main([str(word) for word in job]) == 0
    assert iterations == [1, 2, 3, 4, 5]
    assert [number for number in collected if 0 < number < 5] == times
    assert gc.isenabled() and gc.get_freeze_count() == 0
