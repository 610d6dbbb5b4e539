"""SPMD engine (--device xla): the unsharded model on global tensors, which XLA partitions over all devices.

A step is one graph: all micro-batches, the reduction of gradients and the optimizer. It is compiled once for each
shape; every compilation is reported with its reason.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megatron_lite.backend.group import Group, LocalGroup
from megatron_lite.backend.xla import XlaBackend
from megatron_lite.config.layout import AXES
from megatron_lite.config.run import RunConfig
from megatron_lite.config.selection import select_parameters
from megatron_lite.config.xla import per_process
from megatron_lite.formatting import format_count
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.optim.replicas import Mismatch
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter, apply_selection
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.shared import rank_parameters
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.pipeline.executor import Executor, Messages
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.train.engine import BatchReader, LossSum, PendingStep, Rates
from megatron_lite.train.native import EnqueuedStep, loss_sums, rank_program, read_losses
from megatron_lite.train.spmd_state import SpmdState, partition_spec
from megatron_lite.train.start import Notify

T = TypeVar("T")


@dataclass(frozen=True)
class StepShape:
    """Sizes that determine a graph."""

    microbatches: int
    samples: int
    """Of a micro-batch, over all devices."""
    length: int
    """Tokens of a sample."""
    parts: tuple[str, ...]
    """Parts of a micro-batch: tokens, labels, loss_mask, position_ids."""

    def __str__(self) -> str:
        plural = "" if self.microbatches == 1 else "es"
        return f"{self.microbatches} micro-batch{plural} of {self.samples} x {self.length} tokens"

    def difference(self, other: StepShape) -> str:
        """Return how this shape differs from an earlier one."""
        names = {"microbatches": "micro-batches", "samples": "samples of a micro-batch", "length": "tokens of a sample"}
        found = [
            f"{getattr(self, field)} {name} instead of {getattr(other, field)}"
            for field, name in names.items()
            if getattr(self, field) != getattr(other, field)
        ]
        if self.parts != other.parts:
            found.append(f"{', '.join(self.parts)} instead of {', '.join(other.parts)}")
        return ", ".join(found)


@dataclass
class GraphRunner:
    """Runs graphs, and reports each compilation with its reason.

    Args:
        backend: the devices.
        notify: receives the reports.
    """

    backend: XlaBackend
    notify: Notify
    _shapes: dict[str, list[StepShape]] = field(default_factory=dict)

    def run(self, kind: str, shape: StepShape) -> None:
        """Compile the graph of a step, unless it was before, and start it.

        Args:
            kind: "training step" or "evaluation step".
            shape: of the step.
        """
        before, started = self.backend.compilations(), time.perf_counter()
        self.backend.run_graph()
        after = self.backend.compilations()
        shapes = self._shapes.setdefault(kind, [])
        if after.count > before.count:
            self.notify(self._report(kind, shape, shapes, time.perf_counter() - started, after.cached > before.cached))
        if shapes[-1:] != [shape]:
            shapes.append(shape)

    def _report(self, kind: str, shape: StepShape, earlier: Sequence[StepShape], seconds: float, cached: bool) -> str:
        count = self.backend.compilations().count
        verb = "read from the compilation cache" if cached else "compiled"
        text = f"the {kind} of {shape} was {verb} in {seconds:.1f} s ({format_count(count, 'graph')} in this job)"
        if not earlier:
            return text
        if shape not in earlier:
            return f"WARNING: {text}, because it has {shape.difference(earlier[-1])}"
        return (
            f"WARNING: {text} although a step of this shape ran before: another part of the graph has changed. "
            "PT_XLA_DEBUG_LEVEL=2 prints the code that each graph comes from"
        )


class SpmdEngine:
    """Trains the whole model on all devices; the methods are documented in Engine.

    Args:
        config: the run as this process sees it (config.xla.per_process).
        world: all hosts.
        stage: the whole model, on the devices.
        state: its parameters and optimizer.
        executor: runs micro-batches on the stage.
        graphs: runs the graphs.
        num_sources: data sources of a blend, for the loss of each; 1 or less: a single one.
    """

    def __init__(
        self,
        config: RunConfig,
        world: Group,
        stage: GPTStage,
        state: SpmdState,
        executor: Executor,
        graphs: GraphRunner,
        num_sources: int,
    ) -> None:
        self._config = config
        self._world = world
        self._stage = stage
        self._state = state
        self._executor = executor
        self._graphs = graphs
        self._backend = graphs.backend
        self._num_sources = num_sources if num_sources > 1 else 0

    @property
    def world(self) -> Group:
        """All hosts."""
        return self._world

    def train_step(self, plan: IterationPlan, read: BatchReader, rates: Rates | None = None) -> PendingStep:
        """Start the graph of one iteration."""
        self._stage.train()
        per_token, backend = self._config.per_token_loss, self._backend
        batches: list[MicroBatch] = []
        with backend.phases.enter(self._executor):
            losses = self._executor.run(
                rank_program("1f1b", 1, 0, plan.microbatches, 1, True),
                _recording(read, batches),
                iteration=plan.iteration,
                seq_length=plan.seq_length,
                gradient_scale=1.0 / (plan.tokens if per_token else plan.global_batch),
            )
        with backend.phases.enter("optimizer"):
            sums = loss_sums(losses, self._num_sources, backend)
            loss_is_finite = sums[0, 0].isfinite() if self._config.stops_at_nan else None
            share = sums[1, 0].clamp(min=1.0) / plan.tokens if per_token else None
            lr, weight_decay = (plan.learning_rate, plan.weight_decay) if rates is None else rates()
            step = self._state.step(lr, weight_decay, loss_is_finite, share)
            values = torch.cat((sums.flatten(), step))
        with backend.phases.enter("compiling or starting the graph"):
            self._graphs.run("training step", _shape(batches))
        return EnqueuedStep(backend.read_later(values), sums.numel(), self._state)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return an empty context: --ema-decay is refused."""
        return nullcontext()

    @torch.no_grad()
    def eval_step(self, microbatches: int, read: BatchReader, seq_length: int) -> LossSum:
        """Run forwards only, without dropout."""
        self._stage.eval()
        batches: list[MicroBatch] = []
        with self._backend.phases.enter(self._executor):
            losses = self._executor.run(
                rank_program("1f1b", 1, 0, microbatches, 1, False),
                _recording(read, batches),
                iteration=0,
                seq_length=seq_length,
                gradient_scale=0.0,
            )
        # A view would be computed by a graph of its own when it is read.
        values = loss_sums(losses, self._num_sources, self._backend).flatten().clone()
        self._graphs.run("evaluation step", _shape(batches))
        return read_losses(self._backend.read_later(values)())[0]

    def state_tensors(self) -> list[GlobalTensor]:
        """Return copies of this host's parts of parameters and optimizer state."""
        return self._state.saved_tensors()

    def fill(self, read: Callable[[list[GlobalTensor]], T]) -> T:
        """Replace the state by what `read` writes to its tensors."""
        return self._state.load(read)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of parameters and optimizer state over all devices."""
        return self._state.state_bytes()

    def state_scalars(self) -> dict[str, Any]:
        """Return the step count."""
        return self._state.state_scalars()

    def load_scalars(self, scalars: dict[str, Any]) -> list[str]:
        """Restore the result of state_scalars."""
        self._state.load_scalars(scalars)
        return []

    def compare_replicas(self) -> list[Mismatch]:
        """Return no mismatches: XLA keeps replicas itself, and they cannot be read one by one."""
        return []

    def repair_replicas(self, mismatches: Sequence[Mismatch]) -> None:
        """Do nothing: there are no mismatches."""

    def close(self) -> None:
        """Do nothing: there are no temporary files."""


def build_spmd_engine(config: RunConfig, mesh: Mesh, *, num_sources: int, notify: Notify) -> SpmdEngine:
    """Build the model on the host, and move it to the devices with its partition.

    Args:
        config: the run, with the vocabulary size; sizes of the mesh are those of the devices.
        mesh: of the hosts.
        num_sources: data sources of a blend whose losses are reported one by one.
        notify: receives reports of compilations.

    Raises:
        ConfigError: --freeze or --lr-factors does not fit the model.
    """
    backend = mesh.backend
    assert isinstance(backend, XlaBackend), backend
    # The layers compute on global tensors, as a single rank does. Its groups are local.
    single = per_process(config, 1)
    on_host = copy.copy(backend)
    on_host.device = torch.device("cpu")
    local = Mesh(on_host, single.parallel, {axis: LocalGroup(axis) for axis in AXES}, {AXES: LocalGroup("world")})
    rng = RngStreams(config.runtime.seed, backend)
    stage = GPTStage(single, range(config.model.num_layers), local, rng)
    stage.mask(config.batch.seq_length)  # an input of the graph: built within it, it would make the second one differ
    _move(stage, rank_parameters({0: stage}, {}, 0), backend)
    parameters = apply_selection(rank_parameters({0: stage}, {}, 0), select_parameters(config))
    for layer in stage.decoder.layers.values():
        layer.register_forward_hook(partial(_partition_hidden, config.parallel.sequence_parallel, backend))
    state = SpmdState(config, parameters, backend)
    executor = Executor(
        {0: stage},
        num_stages=1,
        rng=rng,
        messages=Messages(local.pp, backend.device),
        accumulate=state.accumulate_product,
    )
    process = per_process(config, backend.world_size)
    return SpmdEngine(process, mesh.world, stage, state, executor, GraphRunner(backend, notify), num_sources)


def _move(stage: GPTStage, parameters: Sequence[NamedParameter], backend: XlaBackend) -> None:
    """Replace parameters and buffers on the host by partitioned tensors on the devices; shared ones stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for parameter in parameters:
        tensor = backend.place(parameter.param.data, partition_spec(parameter))
        for use in parameter.uses:
            moved[id(use)] = nn.Parameter(tensor, requires_grad=use.requires_grad)
    for module in stage.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, moved[id(param)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            # ALiBi's slopes [n] and bias [n, s, s]; heads are split over tp.
            spec = tuple("tp" if dim == 0 and buffer.numel() else None for dim in range(buffer.dim()))
            setattr(module, name, backend.place(buffer, spec))
    stage.sharding.backend.device = backend.device


def _partition_hidden(
    sequence_parallel: bool, backend: XlaBackend, module: nn.Module, args: tuple[Any, ...], hidden: Tensor
) -> Tensor:
    """Mark hidden states [s, b, h] between layers: samples over dp, and the sequence over tp if it is parallel."""
    return backend.partition_with_gradient(hidden, ("tp" if sequence_parallel else None, "dp", None))


def _recording(read: BatchReader, batches: list[MicroBatch]) -> BatchReader:
    """Return the reader, which also appends what it reads to `batches`.

    Micro-batches are numbered alike on all hosts, because the seeds of dropout follow from the numbers.
    """

    def reader(index: int) -> MicroBatch:
        batches.append(replace(read(index), number=index))
        return batches[-1]

    return reader


def _shape(batches: Sequence[MicroBatch]) -> StepShape:
    parts = ("tokens", "labels", "loss_mask", "position_ids")
    first = batches[0]
    present = tuple(part for part in parts if getattr(first, part) is not None)
    return StepShape(len(batches), *first.shape, present)
