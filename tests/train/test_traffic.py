"""Traffic of one iteration on each axis, against closed formulas; order of the executor, against the schedule."""

from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
from support.layout_matrix import GATHER, LENGTH, SP, VOCABULARY, ZERO1, Cell, mesh_of, reader

from megatron_lite.backend.accounting import counted, totals
from megatron_lite.config.layout import coordinates
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import num_stages, pipeline_schedule, rank_of_stage
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow

HIDDEN, FP32, FP64 = 256, 4, 8  # so wide that no parameter needs padding in its buffer, halved by tp and by ZeRO-1
CELLS = (
    Cell(tp=2, recompute="full"),
    Cell(pp=2, schedule="zb-v"),
    Cell(dp=2, **ZERO1),
    Cell(tp=2, pp=2, model="bloom", schedule="interleaved", layers_per_chunk=1),
    Cell(tp=2, pp=2, schedule="zb-h1", **SP, recompute="full"),
    Cell(tp=2, pp=2, dp=2, schedule="gpipe"),
    Cell(tp=2, pp=2, dp=2, **SP, **ZERO1),
    Cell(tp=2, pp=2, dp=2, schedule="zb-v", **SP, **ZERO1),
    Cell(pp=4, dp=2),
    Cell(cp=4),
    Cell(tp=2, cp=2, dp=2, **GATHER, **ZERO1, recompute="full"),
)


def wide(cell):
    config = cell.config()
    model = replace(config.model, hidden_size=HIDDEN, head_dim=HIDDEN // 8, ffn_hidden_size=4 * HIDDEN)
    parallel = replace(config.parallel, bucket_megabytes=160)
    return replace(config, model=model, parallel=parallel, batch=replace(config.batch, rampup=None))


def count(backend, cell):
    """On one rank: calls and payload of one iteration by (axis, kind), bytes sent on dp, and the executor's trace."""
    config, traffic, trace = wide(cell), [], []
    new_group = backend.new_group
    backend = copy(backend)
    backend.new_group = lambda axis, partition: counted(new_group(axis, partition), traffic)
    mesh = mesh_of(backend, cell.tp, cell.pp, cell.cp)
    engine = build_engine(config, mesh, trace=trace)
    traffic.clear()
    plan = plan_iteration(config, Progress(), replica=mesh.dp.rank)
    engine.train_step(plan, reader(mesh, 0, cell.micro_batch))
    sums = totals(traffic)
    sizes = {key: (total.calls, total.size) for key, total in sums.items()}
    sent = sum(total.sent for (axis, _), total in sums.items() if axis in ("dp", "dp-cp"))
    return sizes, sent, [str(action) for action in trace], plan.microbatches


class Expected:
    """The closed formulas: what a rank's stages send in an iteration of `microbatches` micro-batches."""

    def __init__(self, cell, rank, microbatches):
        self.cell, self.microbatches = cell, microbatches
        self.length = LENGTH // cell.cp
        self.activation = self.length * HIDDEN * FP32
        self.replicas = cell.dp * cell.cp
        self.at = coordinates(rank, cell.config().parallel)
        self.stages = num_stages(cell.schedule, cell.pp, cell.chunks)
        self.own = [stage for stage in range(self.stages) if self.rank_of(stage) == self.at["pp"]]
        self.traffic = Counter()
        self.calls = Counter()

    def rank_of(self, stage):
        return rank_of_stage(self.cell.schedule, self.cell.pp, stage)

    def add(self, axis, kind, calls, payload):
        if calls:
            self.calls[axis, kind] += calls
            self.traffic[axis, kind] += calls * payload

    def result(self):
        if self.cell.tp > 1:
            self.tensor_axis()
        if self.cell.pp > 1:
            self.pipeline_axis()
        if self.cell.cp > 1:
            self.context_axis()
        if self.replicas > 1:
            self.data_axis()
        if self.cell.world > 1:
            self.add("world", "all_reduce", 1, 2 * FP64)  # the losses' sum and count
        if self.cell.zero1 and self.replicas > 1:
            self.add("world", "all_reduce", 1, FP64)  # the gradient norm
        elif self.cell.tp * self.cell.pp > 1:
            self.add("mp", "all_reduce", 1, FP64)
        return {key: (self.calls[key], self.traffic[key]) for key in self.calls}

    def tensor_axis(self):
        cell, m = self.cell, self.microbatches
        layers = m * cell.layers // cell.pp
        again = 2 if cell.recompute == "full" else 0
        if cell.sequence_parallel:
            # Each all-reduce becomes an all-gather and a reduce-scatter; and backward gathers the inputs of qkv and fc1
            # a second time, for their weights' gradients, rather than keep them.
            self.add("tp", "all_gather", layers * (6 + again), self.activation)
            self.add("tp", "reduce_scatter", layers * (4 + again), self.activation)
        else:
            self.add("tp", "all_reduce", layers * (4 + again), self.activation)
        if 0 in self.own:
            kinds = ("reduce_scatter", "all_gather") if cell.sequence_parallel else ("all_reduce",)
            for kind in kinds:
                self.add("tp", kind, m, self.activation)
        if self.stages - 1 in self.own:
            if cell.sequence_parallel:
                self.add("tp", "all_gather", m, self.activation)
                self.add("tp", "reduce_scatter", m, self.activation)
            else:
                self.add("tp", "all_reduce", m, self.activation)
            # The loss: each token's largest logit, sum of exponentials and label's logit, of every rank's columns.
            self.add("tp", "all_gather", m, 3 * cell.tp * self.length * FP32)
        if cell.sequence_parallel:
            self.add("tp", "all_reduce", 1, 0)  # partial_parameters

    def partial_parameters(self):
        """Elements whose gradients add up over tp: norms, biases behind the second matrix, positions."""
        vectors = 6 * self.cell.layers // self.cell.pp
        vectors += LENGTH if 0 in self.own else 0
        vectors += 2 if self.stages - 1 in self.own else 0
        return vectors * HIDDEN if self.cell.sequence_parallel else 0

    def context_axis(self):
        """Keys and values of every layer, once more for each recomputation, and their gradients."""
        cell, rank, others = self.cell, self.at["cp"], self.cell.cp - 1
        layers = self.microbatches * cell.layers // cell.pp
        passes = 3 if cell.recompute else 2
        own = 2 * self.activation // cell.tp
        if cell.exchange == "all_gather":
            self.add("cp", "all_gather", layers * passes, own * cell.cp)
            self.add("cp", "reduce_scatter", layers, own * cell.cp)
            return
        # A rank computes with the first half only of a lower rank's keys: the gradient of the other half is zero.
        for kind, halves in (("send", rank), ("receive", others - rank)):
            self.add("cp", kind, layers * (passes * others + others - halves), own)
            self.add("cp", kind, layers * halves, own // 2)

    def pipeline_axis(self):
        cell, m = self.cell, self.microbatches
        split = cell.tp if cell.sequence_parallel else 1
        after = sum(stage + 1 < self.stages and self.rank_of(stage + 1) != self.at["pp"] for stage in self.own)
        before = sum(stage > 0 and self.rank_of(stage - 1) != self.at["pp"] for stage in self.own)
        self.add("pp", "send", m * (after + before), self.activation // split)
        self.add("pp", "receive", m * (after + before), self.activation // split)
        if (0 in self.own) != (self.stages - 1 in self.own):
            share = cell.dp if cell.zero1 else 1
            self.add("embedding", "all_reduce", 1, self.table() * FP32 // share)

    def table(self):
        return padded_vocab_size(VOCABULARY, 4, self.cell.tp) // self.cell.tp * HIDDEN

    def parameters(self):
        """Elements of this rank's parameters."""
        tp, layers = self.cell.tp, self.cell.layers // self.cell.pp
        total = layers * (12 * HIDDEN * HIDDEN // tp + (3 + 4) * HIDDEN // tp + 6 * HIDDEN)
        first, last = 0 in self.own, self.stages - 1 in self.own
        total += (LENGTH * HIDDEN if first else 0) + (2 * HIDDEN if last else 0)
        return total + (self.table() if first or last else 0)

    def data_axis(self):
        payload, axis = self.parameters() * FP32, "dp-cp" if self.cell.cp > 1 else "dp"
        # Matrices, and vectors, which are not decayed; a tied table's copy lies alone.
        tied = self.cell.pp > 1 and (0 in self.own) != (self.stages - 1 in self.own)
        self.calls[axis, "reduce_scatter" if self.cell.zero1 else "all_reduce"] = 2 + tied
        self.traffic[axis, "reduce_scatter" if self.cell.zero1 else "all_reduce"] = payload
        if self.cell.zero1:
            self.calls[axis, "all_gather"], self.traffic[axis, "all_gather"] = 2 + tied, payload


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_traffic_and_order(cell, on_ranks):
    partial = Counter()
    for rank, (traffic, sent_on_dp, trace, microbatches) in enumerate(on_ranks(cell.world, count, cell)):
        expected = Expected(cell, rank, microbatches)
        sizes = expected.result()
        if cell.sequence_parallel:
            # Under ZeRO-1 a replica sums what it holds of them, so only all replicas together have a closed formula.
            number, size = traffic["tp", "all_reduce"]
            partial[expected.at["pp"], expected.at["tp"]] += size - sizes["tp", "all_reduce"][1]
            assert number == sizes["tp", "all_reduce"][0]
            sizes["tp", "all_reduce"] = number, size
        assert traffic == sizes, rank
        assert sent_on_dp == 2 * expected.parameters() * FP32 * (expected.replicas - 1) // expected.replicas
        if expected.at["dp"] == cell.dp - 1:
            replicas = 1 if cell.zero1 else cell.dp
            assert partial[expected.at["pp"], expected.at["tp"]] == replicas * expected.partial_parameters() * FP32
        schedule = pipeline_schedule(cell.schedule, cell.pp, microbatches, cell.chunks)
        program = lower(schedule, cell.schedule, cell.chunks)[expected.at["pp"]]
        assert trace == [str(action) for action in program]
