"""Memory of each pipeline rank: model state, activations by schedule, loss, communication and allocator slack.

Weights, gradients and optimizer state are exact, with padding. Activations are simulated: tensors as eager torch
allocates them (planner/activations.py), in the order of the pipeline schedule (schedules/in_flight.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig
from megatron_lite.planner.activations import StageMemory, stage_memory
from megatron_lite.planner.model_state import states_of_stages
from megatron_lite.planner.operators import shapes_of
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.in_flight import HeldState, held_states
from megatron_lite.schedules.microbatches import num_microbatches
from megatron_lite.schedules.pipeline import rank_of_stage

SLACK = 0.05
"""Share of the working memory that a caching allocator reserves beyond the tensors: rounding and fragmentation."""


@dataclass(frozen=True)
class RankMemory:
    """Most bytes of a pipeline rank at once, by what they are for. Of the ranks of a stage the first is counted.

    Attributes:
        pp_rank: the pipeline rank.
        stages: (first layer, number of layers) of each of its stages.
        in_flight: most micro-batches, of one stage each, whose activations are held at once.
        weights: parameters in their dtype.
        gradients: fp32 gradient buffers.
        optimizer: fp32 main parameters, moments, moving average, fp8 histories.
        optimizer_parts: the same by kind.
        activations: saved for backward, and gradients and temporary tensors of the layers at the peak.
        loss: logits of a chunk and what its kernels need, if the peak is there; otherwise 0.
        communication: hidden states and their gradients that are received, sent or wait to be.
        slack: estimate of what the allocator reserves beyond these tensors.
    """

    pp_rank: int
    stages: tuple[tuple[int, int], ...]
    in_flight: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_parts: dict[str, int]
    activations: int
    loss: int
    communication: int
    slack: int

    @property
    def model_state(self) -> int:
        """Return the bytes of weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> int:
        """Return the bytes of tensors besides the model state."""
        return self.activations + self.loss + self.communication

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.model_state + self.working + self.slack


LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters."""


def rank_memory(config: RunConfig, *, microbatches: int | None = None) -> tuple[RankMemory, ...]:
    """Return the memory of each pipeline rank.

    Args:
        config: the run, with the vocabulary size.
        microbatches: of the replica in an iteration; None: those of the largest batch of the run.
    """
    parallel = config.parallel
    if microbatches is None:
        microbatches = num_microbatches(
            final_batch_size(config.batch, parallel.dp), config.batch.micro_batch_size, parallel.dp, 0
        )
    model, batch = config.model, config.batch
    layers = stage_layers(model, parallel, batch.seq_length)
    chunks: list[list[range]] = [[] for _ in range(parallel.pp)]
    for stage, part in enumerate(layers):
        chunks[rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage)].append(part)
    shapes = shapes_of(config, batch.seq_length)
    table = _alibi_bytes(model, parallel.tp, batch.seq_length, shapes.itemsize)
    schedule = held_states(parallel.pipeline_schedule, parallel.pp, microbatches, len(chunks[0]))
    return tuple(
        _rank_memory(
            pp_rank,
            own,
            state,
            held,
            [stage_memory(model, config.recompute, shapes, part) for part in own],
            len(own) * table,
        )
        for pp_rank, (own, state, held) in enumerate(zip(chunks, device_states(config), schedule, strict=True))
    )


def device_states(config: RunConfig) -> tuple[dict[str, int], ...]:
    """Return the bytes of model state in device memory of the first rank of each pipeline stage, by kind.

    They are those of states_of_stages, exact, for the native engine. For DeepSpeed they are estimates: ZeRO stage 2
    divides gradients by the replicas, stage 3 also parameters (Rajbhandari et al. 2020, arXiv:1910.02054, section 5),
    of which stage3_max_live_parameters are gathered at a time; state that is offloaded takes no device memory.
    """
    states, parallel, settings = states_of_stages(config), config.parallel, config.deepspeed
    if config.runtime.engine != "deepspeed":
        return states
    replicas = parallel.dp * parallel.cp
    live = config.precision.itemsize * int(settings.zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
    without_optimizer = settings.offload_device("optimizer") != "none"
    found = []
    for state in states:
        parameters, gradients = state["parameters"], state["gradients"]
        if settings.stage >= 2:
            # Offloaded optimizer state is updated by gradients in host memory.
            gradients = 0 if without_optimizer else -(-gradients // replicas)
        if settings.stage == 3:
            shard = 0 if settings.offload_device("param") != "none" else -(-parameters // replicas)
            parameters = min(parameters, shard + live)
        rest = {name: 0 if without_optimizer else state[name] for name in state}
        found.append({**rest, "parameters": parameters, "gradients": gradients})
    return tuple(found)


def _rank_memory(
    pp_rank: int,
    layers: Sequence[range],
    state: Mapping[str, int],
    held: Sequence[HeldState],
    stages: Sequence[StageMemory],
    tables: int,
) -> RankMemory:
    """Return the memory of a rank.

    Args:
        pp_rank: the pipeline rank.
        layers: of each of its stages.
        state: bytes of its model state by kind.
        held: states of the schedule, among which is the one with the most memory.
        stages: working memory of each of its stages.
        tables: bytes of tensors that are there during the whole iteration.
    """
    peak = max((_peak(one, stages) for one in held), key=lambda found: found.total, default=_Peak(0, 0, 0))
    parts = {kind: size for kind, size in state.items() if kind not in ("parameters", "gradients")}
    return RankMemory(
        pp_rank=pp_rank,
        stages=tuple((part.start, len(part)) for part in layers),
        in_flight=max((sum(one.saved) + (one.kind != "W") for one in held), default=0),
        weights=state["parameters"],
        gradients=state["gradients"],
        optimizer=sum(parts.values()),
        optimizer_parts=parts,
        activations=peak.activations + tables,
        loss=peak.loss,
        communication=peak.messages,
        slack=int(SLACK * (peak.total + tables)),
    )


def fullest_bytes(config: RunConfig) -> int:
    """Return the bytes of the pipeline rank with the most of them; arguments as for rank_memory."""
    return max(rank.total for rank in rank_memory(config))


@dataclass(frozen=True)
class _Peak:
    activations: int
    loss: int
    messages: int

    @property
    def total(self) -> int:
        return self.activations + self.loss + self.messages


def _peak(state: HeldState, stages: Sequence[StageMemory]) -> _Peak:
    """Return the bytes of a rank's working memory during one computation."""
    own = stages[state.chunk]
    held = sum(count * stage.saved for count, stage in zip(state.saved, stages, strict=True))
    held += sum(count * stage.deferred for count, stage in zip(state.deferred, stages, strict=True))
    loss = own.loss if state.kind == "F" else 0
    action = {"F": own.forward - loss, "B": own.backward, "W": own.weight}[state.kind]
    return _Peak(held + action, loss, state.messages * own.message)


def _alibi_bytes(model: ModelConfig, tp: int, seq_length: int, itemsize: int) -> int:
    """Return the bytes of ALiBi's bias, s x s for each head, which a stage keeps."""
    if model.position_embedding != "alibi":
        return 0
    return model.num_attention_heads // tp * seq_length**2 * itemsize
