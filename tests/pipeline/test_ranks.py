"""Tests of the pipeline executor on several ranks, run as threads: every schedule, messages, freed tensors."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from support.stage_backward import add_to_grad
from support.tiny_pipeline import Scale, Streams, batches

from megatron_lite.backend.group import LocalGroup
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.tensor_parallel import column_parallel_linear
from megatron_lite.pipeline import executor as executor_module
from megatron_lite.pipeline.executor import Executor, Messages
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import COMPUTE, SPLIT_BACKWARD, num_stages, pipeline_schedule, rank_of_stage
from megatron_lite.schedules.simulate import Costs, simulate

LOCAL = LocalGroup("tp")
COUNT, LENGTH = 3, 4
COMM, TIMES = 0.25, {"forward-compute": 1.0, "backward-compute": 2.0, "weight-gradients": 1.5}
"""Virtual times of a message and of a stage's computations."""
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


class Wires:
    """Messages between ranks that run as threads, by (sender, receiver) in order, with their virtual times."""

    def __init__(self):
        self.changed = threading.Condition()
        self.sends, self.receives = defaultdict(list), defaultdict(list)
        self.failed = False


class Exchange:
    """Sends and receives of one call: the work to wait for.

    It starts when its rank has done the computation before it and its previous exchange has ended; each message takes
    `COMM` from the start of both exchanges that hold it.
    """

    def __init__(self, mailbox):
        self.mailbox, self.wires = mailbox, mailbox.wires
        self.after, self.before = mailbox.clock, mailbox.last
        self.receiving, self.others, self.known_end = [], [], None

    def start(self):
        before = 0.0 if self.before is None else self.before.end()
        return None if before is None else max(self.after, before)

    def end(self):
        """Return the time of the end; None: another rank has not reached its side."""
        if self.known_end is None:
            if any(len(listed) <= index for listed, index in self.others):
                return None
            starts = [self.start(), *(listed[index][0].start() for listed, index in self.others)]
            self.known_end = None if None in starts else max(starts) + COMM
        return self.known_end

    def wait(self):
        with self.wires.changed:
            assert self.wires.changed.wait_for(lambda: self.wires.failed or self.end() is not None, timeout=60)
            assert not self.wires.failed, "another rank failed"
            self.mailbox.clock = max(self.mailbox.clock, self.end())
            for tensor, listed, index in self.receiving:
                sent = listed[index][1]
                assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
                tensor.copy_(sent)
            self.receiving.clear()


class Mailbox(LocalGroup):
    """Pipeline group of a rank that runs as a thread."""

    def __init__(self, rank, wires):
        super().__init__("pp")
        self.me, self.wires, self.clock, self.last = rank, wires, 0.0, None

    def exchange(self, sends, receives):
        assert all(peer != self.me and not tensor.requires_grad for tensor, peer in sends)
        with self.wires.changed:
            self.last = work = Exchange(self)
            for tensor, peer in sends:
                pair = self.me, peer
                work.others.append((self.wires.receives[pair], len(self.wires.sends[pair])))
                self.wires.sends[pair].append((work, tensor.clone()))
            for tensor, peer in receives:
                pair = peer, self.me
                at = self.wires.sends[pair], len(self.wires.receives[pair])
                work.others.append(at)
                work.receiving.append((tensor, *at))
                self.wires.receives[pair].append((work, None))
            self.wires.changed.notify_all()
        return [work] * (len(sends) + len(receives))


class Rank:
    """One pipeline rank: its stages, program and results."""

    def __init__(self, rank, kind, pp, chunks, program, wires):
        self.deferred = DeferredWeightGradients() if kind in SPLIT_BACKWARD else None
        stages = num_stages(kind, pp, chunks)
        self.stages = {
            stage: Linear(stage + 2, self.deferred) for stage in range(stages) if rank_of_stage(kind, pp, stage) == rank
        }
        for stage in self.stages.values():
            stage.weight.grad = torch.zeros_like(stage.weight)
        self.program, self.trace, self.timed = program[rank], [], Counter()
        self.mailbox, self.streams, self.spans = Mailbox(rank, wires), Streams(), []
        self.executor = Executor(
            self.stages,
            num_stages=stages,
            rng=self.streams,
            messages=Messages(self.mailbox, torch.device("cpu")),
            accumulate=add_to_grad,
            deferred=self.deferred,
            trace=self.trace,
            timed=self.measure,
        )

    @contextmanager
    def measure(self, name):
        self.timed[name] += 1
        yield
        if name in TIMES:
            start = self.mailbox.clock
            whole = name == "backward-compute" and self.deferred is None
            self.mailbox.clock += TIMES[name] + (TIMES["weight-gradients"] if whole else 0.0)
            self.spans.append((start, self.mailbox.clock))

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
    wires = Wires()
    ranks = [Rank(rank, kind, pp, chunks, program, wires) for rank in range(pp)]
    errors = []

    def guarded(rank):
        try:
            rank.run(train)
        except BaseException as error:
            errors.append(error)
            with wires.changed:
                wires.failed = True
                wires.changed.notify_all()

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert {pair: len(sent) for pair, sent in wires.sends.items() if sent} == {
        pair: len(received) for pair, received in wires.receives.items() if received
    }
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
        assert rank.trace == rank.program
        computed = [action for action in rank.trace if action.kind in COMPUTE]
        assert rank.streams.positions == [(7, 10 + action.microbatch) for action in computed]
    assert len(kept) == pp
    for tensors in kept:
        assert not any(vars(tensors).values())


@pytest.mark.parametrize("comm", [0.0, 0.25, 3.0])
@pytest.mark.parametrize(("kind", "pp", "chunks"), [*LAYOUTS, ("1f1b", 4, 1), ("zb-h1", 4, 1), ("zb-v", 3, 1)])
def test_computations_start_when_the_simulation_says(kind, pp, chunks, comm, monkeypatch):
    """The executor runs with virtual delays of computations and messages, and records its trace."""
    monkeypatch.setitem(globals(), "COMM", comm)
    forward, backward, weight = TIMES.values()
    line = simulate(
        lower(pipeline_schedule(kind, pp, COUNT, chunks), kind, chunks),
        Costs(forward=forward, backward=backward, weight=weight, comm=comm),
    )
    expected = [[(span.start, span.end) for span in spans] for spans in line.ranks]
    assert [rank.spans for rank in run(kind, pp, chunks)] == expected


@pytest.mark.parametrize(("kind", "pp", "chunks"), LAYOUTS)
def test_evaluation_runs_forwards_only_and_frees_all_tensors(kind, pp, chunks, kept):
    ranks = run(kind, pp, chunks, train=False)
    assert_losses(ranks)
    for tensors in kept:
        assert not any(vars(tensors).values())
    for rank in ranks:
        assert not any(stage.weight.grad.any() for stage in rank.stages.values())
        assert {action.kind for action in rank.trace} <= {"F", "SEND_F", "RECV_F"}


def test_actions_are_timed_under_megatrons_names():
    for rank in run("zb-h1", 2, 1):
        batches_of_messages = sum(action.kind not in COMPUTE for action in rank.trace) - sum(
            {before.kind, after.kind}.isdisjoint(COMPUTE) for before, after in pairwise(rank.trace)
        )
        assert rank.timed == {
            "batch-generator": COUNT,
            "forward-compute": COUNT,
            "backward-compute": COUNT,
            "weight-gradients": COUNT,
            "pipeline-messages": batches_of_messages + COUNT,  # each batch is started, each input awaited
        }


class Wire(LocalGroup):
    """Group that records sends, receives and waits."""

    def __init__(self):
        super().__init__("pp")
        self.log = []

    def exchange(self, sends, receives):
        self.log.append([f"send to {peer}" for _, peer in sends] + [f"receive from {peer}" for _, peer in receives])
        assert all(tensor.is_contiguous() for tensor, _ in sends)
        return [Waited(self.log, name) for name in self.log[-1]]


class Waited:
    """Work that records that it was waited for."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait(self):
        self.log.append(f"wait: {self.name}")


def test_messages_are_asynchronous_and_batched():
    wire = Wire()
    messages = Messages(wire, torch.device("cpu"))
    (received,) = messages.exchange([(torch.zeros(3, 2).t(), 1)], [((2, 5), torch.bfloat16, 3)])
    assert wire.log == [["send to 1", "receive from 3"]]
    tensor = received.wait()
    assert (tuple(tensor.shape), tensor.dtype) == ((2, 5), torch.bfloat16)
    for peer in range(2, 2 + executor_module.MAX_SENDS):
        messages.exchange([(torch.zeros(1), peer)], [])
    assert wire.log[1] == "wait: receive from 3"
    assert [entry for entry in wire.log[2:] if "wait" in entry[:4]] == ["wait: send to 1"]  # the oldest of too many
    messages.finish()
    messages.finish()
    assert wire.log[-executor_module.MAX_SENDS :] == [
        f"wait: send to {peer}" for peer in range(2, 2 + executor_module.MAX_SENDS)
    ]


def test_the_memory_of_a_sent_output_is_freed_before_its_backward():
    """The graph of an output is kept without the output: backward needs the gradient only."""
    sent = []

    class Kept(Wire):
        def exchange(self, sends, receives):
            sent.extend(weakref.ref(tensor.untyped_storage()) for tensor, _ in sends)
            return super().exchange(sends, receives)

    messages = Messages(Kept(), torch.device("cpu"))
    stage = Scale(2)
    executor = Executor({0: stage}, num_stages=2, rng=Streams(), messages=messages, accumulate=lambda *_: None)
    alive = []

    def read(index):
        alive.append([ref() is not None for ref in sent])
        return batches(8)[index]

    program = lower(pipeline_schedule("gpipe", 2, 8), "gpipe")[0]
    executor.run(program, read, iteration=1, seq_length=LENGTH, gradient_scale=1.0)
    assert len(sent) == 8
    assert max(map(sum, alive)) <= executor_module.MAX_SENDS
