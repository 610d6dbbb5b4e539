"""Tests of the pipeline executor on one rank with scalar stages: order, gradients, evaluation."""

from __future__ import annotations

import pytest
import torch
from support.stage_backward import add_to_grad
from support.tiny_pipeline import Scale, Streams, batches

from megatron_lite.backend.group import LocalGroup
from megatron_lite.pipeline.executor import Executor, Messages
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import pipeline_schedule


def executor(stages, trace=None):
    streams = Streams()
    made = Executor(
        stages,
        num_stages=len(stages),
        rng=streams,
        messages=Messages(LocalGroup("pp"), torch.device("cpu")),
        accumulate=add_to_grad,
        trace=trace,
    )
    return made, streams


def program(count, chunks=1, *, backward=True):
    kind = "interleaved" if chunks > 1 else "1f1b"
    schedule = pipeline_schedule(kind, 1, count, chunks)
    if not backward:
        schedule = [[action for action in schedule[0] if action.kind == "F"]]
    return lower(schedule, kind, chunks)[0]


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_losses_gradients_and_order(chunks):
    stages = {number: Scale(number + 2) for number in range(chunks)}
    trace = []
    made, streams = executor(stages, trace)
    given = batches(3)
    losses = made.run(program(3, chunks), given.__getitem__, iteration=7, seq_length=4, gradient_scale=0.5)
    product = torch.tensor([float(number + 2) for number in range(chunks)]).prod()
    expected = [float(product) * (number + 1) for number in range(3)]
    assert [sample.tolist() for sample in losses.samples] == [[value, value] for value in expected]
    assert losses.sources == [(0, 1)] * 3
    # d(sum of losses)/d(weight) = 2 samples x (1 + 2 + 3) x the other weights, times the scale.
    for stage in stages.values():
        assert float(stage.weight.grad) == pytest.approx(0.5 * 2 * 6 * float(product / stage.weight))
    assert trace == list(program(3, chunks))
    assert streams.positions == [(7, 10 + action.microbatch) for action in trace]


def test_evaluation_keeps_no_graph():
    stages = {0: Scale(2), 1: Scale(3)}
    made, _ = executor(stages)
    with torch.no_grad():
        losses = made.run(
            program(2, 2, backward=False), batches(2).__getitem__, iteration=0, seq_length=4, gradient_scale=0.0
        )
    assert [float(sample[0]) for sample in losses.samples] == [6.0, 12.0]
    assert all(stage.weight.grad is None for stage in stages.values())


def test_a_replica_without_micro_batches_runs_nothing():
    made, _ = executor({0: Scale(2)})
    losses = made.run(program(0), batches(0).__getitem__, iteration=1, seq_length=4, gradient_scale=1.0)
    assert losses.samples == []


def test_each_micro_batch_is_read_once_before_its_first_action():
    read = []

    def reader(index):
        read.append(index)
        return batches(3)[index]

    made, _ = executor({0: Scale(2)})
    made.run(program(3), reader, iteration=1, seq_length=4, gradient_scale=1.0)
    assert read == [0, 1, 2]
