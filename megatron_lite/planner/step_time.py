"""Step time: seconds of one iteration by part, from the shapes, the layout and the hardware table.

The parts are those of the pipeline rank with the most work; what it waits for is the bubble. The formulas are in
compute.py (kernels), communication.py (collectives) and bubble.py (pipeline schedule).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_lite.config.counts import flops_per_token, layer_forward_flops
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.recompute import recompute_units
from megatron_lite.config.run import RunConfig
from megatron_lite.planner.bubble import pipeline_seconds
from megatron_lite.planner.communication import Axis
from megatron_lite.planner.compute import LayerCosts, Passes, Seconds, element_bytes
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.model_state import GRADIENT_BYTES, states_of_stages
from megatron_lite.schedules.microbatches import num_microbatches
from megatron_lite.schedules.pipeline import SPLIT_BACKWARD, num_chunks, rank_of_stage
from megatron_lite.schedules.simulate import Costs

OPTIMIZER_BYTES = {"adam": 28, "adamw8bit": 17, "muon": 20, "lion": 20, "sgd": 20, "adafactor": 24}
"""Bytes that the update reads and writes for a parameter: gradient, main parameter and moments."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one iteration by part, and its FLOPs.

    Attributes:
        matmul: matrix products of linear layers and head.
        attention: core of attention.
        elementwise: norms, activations, residuals, dropout, embedding, loss.
        recompute: kernels that run again in backward.
        tensor_parallel: collectives of the tensor-parallel axis that nothing hides; likewise the following.
        context_parallel: exchange of keys and values.
        pipeline: messages between stages.
        bubble: idle time of the pipeline rank with the most work.
        data_parallel: gradient reduction and parameter gather.
        optimizer: norm, update of the main parameters, conversion.
        microbatches: of the replica with the most.
        tokens: of the iteration, over all replicas.
        devices: ranks of the job.
        model_flops: of the iteration (config/counts.py), which MFU counts.
        hardware_flops: with recomputation, which HFU counts.
    """

    matmul: float
    attention: float
    elementwise: float
    recompute: float
    tensor_parallel: float
    context_parallel: float
    pipeline: float
    bubble: float
    data_parallel: float
    optimizer: float
    microbatches: int
    tokens: int
    devices: int
    model_flops: float
    hardware_flops: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)[: len(PARTS)]}

    @property
    def total(self) -> float:
        """Seconds of the iteration."""
        return sum(self.parts.values())

    @property
    def model_flops_per_second(self) -> float:
        """Model FLOP/s of one device."""
        return self.model_flops / self.total / self.devices

    @property
    def hardware_flops_per_second(self) -> float:
        """FLOP/s of one device with recomputation."""
        return self.hardware_flops / self.total / self.devices


PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise",
    "recompute": "recomputation",
    "tensor_parallel": "tensor-parallel communication",
    "context_parallel": "context-parallel communication",
    "pipeline": "pipeline messages",
    "bubble": "pipeline bubble",
    "data_parallel": "data-parallel communication",
    "optimizer": "optimizer",
}
"""Names of the parts of a step, in the order of StepTime."""


def step_time_of(config: RunConfig, machine: Hardware, global_batch: int, seq_length: int) -> StepTime:
    """Return the step time of an iteration of `global_batch` samples of `seq_length` tokens."""
    return StepModel(config, machine, seq_length).time(global_batch)


class StepModel:
    """Step time of one layout and sequence length, for any batch size.

    Args:
        config: its model.padded_vocab_size should be filled in.
        machine: device, node size and efficiencies.
        seq_length: of the iterations.
    """

    def __init__(self, config: RunConfig, machine: Hardware, seq_length: int) -> None:
        self._config, self._machine, self._length = config, machine, seq_length
        parallel = config.parallel
        self._tp = Axis(parallel.tp, 1, machine)
        self._cp = Axis(parallel.cp, parallel.tp, machine)
        # Gradients are summed over context and data parallelism.
        self._dp = Axis(parallel.dp * parallel.cp, parallel.tp, machine)
        self._pp = Axis(parallel.pp, parallel.tp * parallel.cp * parallel.dp, machine)
        self._costs = LayerCosts(config, machine, seq_length)
        self._split = parallel.pipeline_schedule in SPLIT_BACKWARD
        self._layers = stage_layers(config.model, parallel, config.batch.seq_length)
        self._stages = self._stage_passes()
        self._ranks = self._by_rank()
        self._busiest = max(self._ranks, key=lambda passes: passes.total)
        self._stage_costs, self._message = self._pipeline_costs()
        self._reduction, self._update = self._data_parallel(self._busiest), self._optimizer()

    def time(self, global_batch: int) -> StepTime:
        """Return the parts of a step."""
        config, parallel = self._config, self._config.parallel
        microbatches = num_microbatches(global_batch, config.batch.micro_batch_size, parallel.dp, 0)
        work = (self._busiest.forward + self._busiest.backward + self._busiest.weight) * microbatches
        without, with_messages = self._pipeline(microbatches)
        tokens = global_batch * self._length
        model_flops = float(tokens) * flops_per_token(config.model, self._length)
        again = self._recomputed_layers() * layer_forward_flops(config.model, self._length)
        return StepTime(
            **{entry.name: getattr(work, entry.name) for entry in fields(Seconds)},
            pipeline=max(0.0, with_messages - without),
            bubble=max(0.0, without - work.total),
            data_parallel=self._reduction,
            optimizer=self._update,
            microbatches=microbatches,
            tokens=tokens,
            devices=parallel.world_size,
            model_flops=model_flops,
            hardware_flops=model_flops + float(tokens) * again,
        )

    def forward_seconds(self, global_batch: int) -> float:
        """Return the seconds of the forward passes of a global batch, as in an evaluation."""
        parallel = self._config.parallel
        microbatches = num_microbatches(global_batch, self._config.batch.micro_batch_size, parallel.dp, 0)
        slowest = max(passes.forward.total for passes in self._ranks)
        first = sum(passes.forward.total for passes in self._stages) - slowest
        return microbatches * slowest + first

    def _stage_passes(self) -> list[Passes]:
        """Return the passes of each stage for a micro-batch, recomputation and exposed communication included."""
        layer, again = self._layer_passes()
        stages = []
        for number, layers in enumerate(self._layers):
            repeated = _recomputed_of(self._config, len(layers))
            passes = layer * len(layers) + Passes(backward=again * repeated)
            if number == 0:
                passes += self._costs.embedding()
            if number == len(self._layers) - 1:
                passes += self._costs.head()
            stages.append(passes)
        return stages

    def _layer_passes(self) -> tuple[Passes, Seconds]:
        """Return the passes of one layer, and the seconds of its recomputation."""
        passes = self._costs.layer()
        passes += self._tensor_parallel(passes.weight.matmul) + self._context_parallel(passes)
        if self._config.recompute.granularity == "selective":
            core = Seconds(attention=passes.forward.attention)
            return passes, core.as_recompute()
        return passes, passes.forward.as_recompute()

    def _tensor_parallel(self, weight: float) -> Passes:
        """Return the collectives of a layer that nothing hides.

        Forward waits for all. In backward, the sum of the input gradients overlaps with the weight gradients, unless
        those are computed later or torch.compile orders the collectives; under sequence parallelism the gather of the
        row-parallel layers' gradients is waited for, and that of the inputs overlaps with the input gradients.
        """
        hidden = self._costs.tokens * self._config.model.hidden_size * self._activation_bytes
        overlaps = not self._split and self._config.runtime.compile == "off"
        hideable = weight / 2 if overlaps else 0.0
        if self._config.parallel.sequence_parallel:
            one = self._tp.all_gather(hidden)
            forward, backward = 4 * one, 2 * one + 2 * max(0.0, one - hideable)
        else:
            one = self._tp.all_reduce(hidden)
            forward, backward = 2 * one, 2 * max(0.0, one - hideable)
        return Passes(Seconds(tensor_parallel=forward), Seconds(tensor_parallel=backward))

    def _context_parallel(self, passes: Passes) -> Passes:
        """Return the exchange of keys and values, round a ring beside the attention of the blocks before, or gathered.

        Backward exchanges them again, and returns the gradients of as many.
        """
        model, parallel, size = self._config.model, self._config.parallel, self._cp.size
        groups = max(1, model.num_query_groups // parallel.tp)
        shared = 2 * self._costs.tokens * groups * model.head_dim * self._activation_bytes * size
        exchange = self._cp.all_gather(shared)
        hidden = (size - 1) / size if parallel.cp_comm_type == "p2p" else 0.0
        return Passes(
            Seconds(context_parallel=max(0.0, exchange - hidden * passes.forward.attention)),
            Seconds(context_parallel=max(0.0, 2 * exchange - hidden * passes.backward.attention)),
        )

    def _pipeline(self, microbatches: int) -> tuple[float, float]:
        """Return the seconds of the schedule with instant messages, and with the network's."""
        parallel = self._config.parallel
        if parallel.pp == 1:
            alone = microbatches * self._busiest.total
            return alone, alone
        kind, costs = parallel.pipeline_schedule, self._stage_costs
        without, with_messages = (
            pipeline_seconds(kind, parallel.pp, microbatches, self._chunks, replace(costs, comm=comm))
            for comm in (0.0, self._message)
        )
        return without, with_messages

    def _pipeline_costs(self) -> tuple[Costs, float]:
        """Return the seconds of a mean stage and the relative work of each, and the seconds of a message."""
        parallel, count = self._config.parallel, len(self._stages)
        mean = sum(passes.total for passes in self._stages) / count
        hidden = self._costs.tokens * self._config.model.hidden_size * self._activation_bytes
        costs = Costs(
            forward=sum(passes.forward.total for passes in self._stages) / count,
            backward=sum(passes.backward.total for passes in self._stages) / count,
            weight=sum(passes.weight.total for passes in self._stages) / count,
            stages=tuple(passes.total / mean for passes in self._stages),
        )
        return costs, self._pp.message(hidden / (parallel.tp if parallel.sequence_parallel else 1))

    def _data_parallel(self, busiest: Passes) -> float:
        """Return the reduction beyond the last backward pass and the gather beyond the first forward pass."""
        parallel, axis = self._config.parallel, self._dp
        parameters = self._trained()
        gradients = float(GRADIENT_BYTES * parameters)
        seconds = 0.0
        if self._config.model.tied_embeddings and parallel.pp > 1:
            rows = self._config.model.vocab_rows
            seconds += self._pp.message(8.0 * rows * self._config.model.embedding_width / parallel.tp)
        if axis.size == 1:
            return seconds
        # The last bucket is complete when backward ends, the first parameters are needed when forward begins.
        bucket = min(1.0, parallel.bucket_megabytes * 2**20 / max(gradients, 1.0))
        backward = busiest.backward.total + busiest.weight.total
        reduce = axis.all_gather(gradients) if parallel.distributed_optimizer else axis.all_reduce(gradients)
        seconds += _exposed(reduce, backward, bucket, parallel.overlap_grad_reduce)
        if parallel.distributed_optimizer:
            gather = axis.all_gather(parameters * self._activation_bytes)
            overlaps = parallel.overlap_param_gather and self._config.runtime.compile != "stage"
            seconds += _exposed(gather, busiest.forward.total, bucket, overlaps)
        return seconds

    def _optimizer(self) -> float:
        """Return the seconds of norm, update and conversion of the main parameters."""
        config, parallel = self._config, self._config.parallel
        parameters = self._trained() / (self._dp.size if parallel.distributed_optimizer else 1)
        size = OPTIMIZER_BYTES[config.optimizer.kind] + (4 if config.optimizer.clip_grad else 0)
        size += 0 if config.precision.dtype == "fp32" else 2
        size += 12 if config.optimizer.ema_decay else 0
        seconds = parameters * size / self._machine.optimizer_rate
        return seconds + (self._orthogonalization() if config.optimizer.kind == "muon" else 0.0)

    def _orthogonalization(self) -> float:
        """Return the seconds of Muon's Newton-Schulz iterations over the matrices of a rank's layers."""
        model, parallel, optimizer = self._config.model, self._config.parallel, self._config.optimizer
        hidden, wide = model.hidden_size, model.ffn_hidden_size
        queries = model.num_attention_heads * model.head_dim
        matrices = [(hidden, queries)] * 4 + [(hidden, wide)] * (3 if model.gated else 2)
        # X Xᵀ, its square, and the product with X.
        flops = sum(4.0 * min(pair) ** 2 * max(pair) + 2.0 * min(pair) ** 3 for pair in matrices)
        layers = max(map(len, self._layers)) * self._chunks
        shards = self._dp.size if parallel.distributed_optimizer else 1
        shards *= parallel.tp if optimizer.muon_tp_mode == "blockwise" else 1
        rate = self._machine.device.rate("bf16") * self._machine.efficiency.matmul
        return flops * optimizer.muon_num_ns_steps * layers / shards / rate

    def _by_rank(self) -> list[Passes]:
        parallel = self._config.parallel
        ranks = [Passes()] * parallel.pp
        for stage, passes in enumerate(self._stages):
            rank = rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage)
            ranks[rank] += passes
        return ranks

    def _trained(self) -> int:
        """Return the trained parameters of the rank with the most of them, padding of its buffers included."""
        return max(state["gradients"] for state in states_of_stages(self._config)) // GRADIENT_BYTES

    def _recomputed_layers(self) -> float:
        """Return the layers of the model that run forward twice; the core of attention alone counts as its share."""
        config = self._config
        count = sum(_recomputed_of(config, len(layers)) for layers in self._layers)
        if config.recompute.granularity != "selective":
            return float(count)
        queries = config.model.num_attention_heads * config.model.head_dim
        return count * 4.0 * self._length * queries / layer_forward_flops(config.model, self._length)

    @property
    def _chunks(self) -> int:
        return num_chunks(self._config.parallel.pipeline_schedule, len(self._layers) // self._config.parallel.pp)

    @property
    def _activation_bytes(self) -> int:
        return element_bytes(self._config.precision.dtype)


def _recomputed_of(config: RunConfig, layers: int) -> int:
    """Return how many of a stage's layers run again in backward; selective: a part of each."""
    if config.recompute.granularity == "selective":
        return layers
    return sum(len(unit) for unit, again in recompute_units(layers, config.recompute) if again)


def _exposed(seconds: float, hidden_by: float, bucket: float, overlaps: bool) -> float:
    """Return what remains of a collective that runs bucket by bucket beside `hidden_by` seconds of computation."""
    return max(seconds * bucket, seconds - hidden_by) if overlaps else seconds
