"""Tests of the pipeline executor on several ranks, run as threads: every schedule, messages, freed tensors."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from support.tiny_pipeline import Scale, Streams, batches

from megatron_lite.backend.group import LocalGroup
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.tensor_parallel import column_parallel_linear
from megatron_lite.pipeline import executor as executor_module
from megatron_lite.pipeline.executor import Executor, Messages
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import SPLIT_BACKWARD, num_stages, pipeline_schedule, rank_of_stage

LOCAL = LocalGroup("tp")
COUNT, LENGTH = 3, 4
LAYOUTS = [
    ("gpipe", 2, 1),
    ("1f1b", 2, 1),
    ("1f1b", 3, 1),
    ("interleaved", 2, 2),
    ("zb-h1", 2, 1),
    ("zb-v", 2, 1),
    ("zb-v", 1, 1),
]


class Linear(Scale):
    """Scale, whose weight gradient can be deferred."""

    def __init__(self, weight, deferred):
        super().__init__(weight)
        self.weight = torch.nn.Parameter(self.weight.detach().reshape(1, 1))
        self.deferred = deferred
        self.embedding = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, batch):
        x = batch.tokens.t().unsqueeze(-1) * self.embedding if x is None else x
        return column_parallel_linear(x, self.weight, None, LOCAL, False, self.deferred)


class Mailbox:
    """P2P messages between threads, checked against the shape and dtype that the receiver expects."""

    def __init__(self, rank, boxes):
        self.rank, self.boxes, self.finished = rank, boxes, 0

    def send(self, tensor, peer):
        assert peer != self.rank and not tensor.requires_grad
        self.boxes[self.rank, peer].put(tensor.clone())

    def receive(self, shape, dtype, peer):
        tensor = self.boxes[peer, self.rank].get(timeout=60)
        assert tensor is not None, "another rank failed"
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        return tensor

    def finish(self):
        self.finished += 1


class Rank:
    """One pipeline rank: its stages, program and results."""

    def __init__(self, rank, kind, pp, chunks, program, boxes):
        self.deferred = DeferredWeightGradients() if kind in SPLIT_BACKWARD else None
        stages = num_stages(kind, pp, chunks)
        self.stages = {
            stage: Linear(stage + 2, self.deferred) for stage in range(stages) if rank_of_stage(kind, pp, stage) == rank
        }
        for stage in self.stages.values():
            stage.weight.grad = torch.zeros_like(stage.weight)
        self.program, self.trace, self.timed = program[rank], [], Counter()
        self.messages, self.streams = Mailbox(rank, boxes), Streams()
        self.executor = Executor(
            self.stages,
            num_stages=stages,
            rng=self.streams,
            messages=self.messages,
            accumulate=lambda weight, gradient: weight.grad.add_(gradient),
            deferred=self.deferred,
            trace=self.trace,
            timed=self.measure,
        )

    @contextmanager
    def measure(self, name):
        self.timed[name] += 1
        yield

    def run(self, train):
        with torch.set_grad_enabled(train):
            self.losses = self.executor.run(
                self.program, batches(COUNT).__getitem__, iteration=7, seq_length=LENGTH, gradient_scale=0.5
            )


@pytest.fixture
def kept(monkeypatch):
    """Record the tensors that each run stores between its actions."""
    made = []
    original = executor_module._Tensors

    def make():
        made.append(original())
        return made[-1]

    monkeypatch.setattr(executor_module, "_Tensors", make)
    return made


def run(kind, pp, chunks, train=True):
    schedule = pipeline_schedule(kind, pp, COUNT, chunks)
    if not train:
        schedule = [[action for action in actions if action.kind == "F"] for actions in schedule]
    program = lower(schedule, kind, chunks)
    boxes = {(one, other): queue.Queue() for one in range(pp) for other in range(pp)}
    ranks = [Rank(rank, kind, pp, chunks, program, boxes) for rank in range(pp)]
    errors = []

    def guarded(rank):
        try:
            rank.run(train)
        except BaseException as error:
            errors.append(error)
            for box in boxes.values():
                box.put(None)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(box.empty() for box in boxes.values())
    return ranks


def assert_losses(ranks):
    """Assert that the rank of the last stage, alone, has losses: the product of all weights times the mean token."""
    weights = [int(stage.weight) for rank in ranks for stage in rank.stages.values()]
    product = torch.tensor(weights).prod().item()
    with_losses = [rank for rank in ranks if rank.losses.samples]
    assert [len(weights) - 1 in rank.stages for rank in with_losses] == [True]
    (losses,) = (rank.losses for rank in with_losses)
    assert [sample.tolist() for sample in losses.samples] == [[product * (number + 1)] * 2 for number in range(COUNT)]
    assert losses.sources == [(0, 1)] * COUNT
    assert not any(sample.requires_grad for sample in losses.samples)
    return product


@pytest.mark.parametrize(("kind", "pp", "chunks"), LAYOUTS)
def test_every_schedule_computes_the_losses_and_gradients_of_the_chain(kind, pp, chunks, kept):
    ranks = run(kind, pp, chunks)
    product = assert_losses(ranks)
    for rank in ranks:
        for stage in rank.stages.values():  # all numbers are small and whole: exact in fp32
            assert stage.weight.grad.item() == 0.5 * 2 * (1 + 2 + 3) * product / stage.weight.item()
        assert rank.trace == rank.program and rank.messages.finished == 1
        assert rank.streams.positions == [(7, 10 + action.microbatch) for action in rank.trace]
    assert len(kept) == pp
    for tensors in kept:
        assert not (tensors.inputs or tensors.outputs or tensors.gradients or tensors.batches)


@pytest.mark.parametrize(("kind", "pp", "chunks"), LAYOUTS)
def test_evaluation_runs_forwards_only_and_frees_all_tensors(kind, pp, chunks, kept):
    ranks = run(kind, pp, chunks, train=False)
    assert_losses(ranks)
    for tensors in kept:
        assert not (tensors.inputs or tensors.outputs or tensors.gradients or tensors.batches)
    for rank in ranks:
        assert not any(stage.weight.grad.any() for stage in rank.stages.values())
        assert {action.kind for action in rank.trace} <= {"F", "SEND_F", "RECV_F"}


def test_actions_are_timed_under_megatrons_names():
    for rank in run("zb-h1", 2, 1):
        assert rank.timed == {
            "batch-generator": COUNT,
            "forward-compute": COUNT,
            "backward-compute": COUNT,
            "weight-gradients": COUNT,
            "pipeline-messages": 2 * COUNT,
        }


class Wire(LocalGroup):
    """Group that records sends, receives and waits."""

    def __init__(self):
        super().__init__("pp")
        self.log = []

    def exchange(self, sends, receives):
        self.log += [("send", peer, tensor.is_contiguous()) for tensor, peer in sends]
        self.log += [("receive", peer, tuple(tensor.shape)) for tensor, peer in receives]
        return [Waited(self.log)]

    def send(self, tensor, peer):
        return self.exchange([(tensor, peer)], [])[0]

    def recv_(self, tensor, peer):
        return self.exchange([], [(tensor, peer)])[0]


class Waited:
    """Work that records that it was waited for."""

    def __init__(self, log):
        self.log = log

    def wait(self):
        self.log.append("wait")


def test_sends_are_asynchronous_and_receives_block():
    wire = Wire()
    messages = Messages(wire, torch.device("cpu"))
    messages.send(torch.zeros(3, 2).t(), 1)
    assert wire.log == [("send", 1, True)]
    messages.send(torch.zeros(1), 2)
    assert wire.log[1:] == ["wait", ("send", 2, True)]
    received = messages.receive((2, 5), torch.bfloat16, 3)
    assert (tuple(received.shape), received.dtype) == ((2, 5), torch.bfloat16)
    assert wire.log[3:] == [("receive", 3, (2, 5)), "wait"]
    messages.finish()
    messages.finish()
    assert wire.log[5:] == ["wait"]
