"""Native engine: forward, backward, gradient reduction and optimizer step of one rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_lite.backend.base import Backend, Reading
from megatron_lite.backend.group import Group
from megatron_lite.config.parallel import PipelineKind
from megatron_lite.config.run import RunConfig
from megatron_lite.model.gpt import GPTStage
from megatron_lite.optim.optimizer import Optimizer, StepResult
from megatron_lite.optim.replicas import Mismatch, Replicas
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.delayed_scaling import AmaxHistory
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.tensors import GlobalTensor, parameter_tensor
from megatron_lite.pipeline.executor import Executor, StepLosses, Timed
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import Action, pipeline_schedule
from megatron_lite.train.engine import BatchReader, LossSum, PendingStep, Rates, StepOutcome

T = TypeVar("T")


class NativeEngine:
    """Trains this rank's stages; the methods are documented in Engine.

    Args:
        config: the run.
        mesh: this rank's groups.
        stages: this rank's model chunks by global stage number.
        buffers: their parameters and gradients.
        optimizer: steps on the buffers.
        executor: runs programs on the stages.
        num_sources: data sources of a blend, for the loss of each; 1 or less: a single one.
        timed: measures the parts of a step; None: no timing.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        stages: Mapping[int, GPTStage],
        buffers: ParameterBuffers,
        optimizer: Optimizer,
        executor: Executor,
        num_sources: int,
        timed: Timed | None = None,
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._stages = stages
        self._buffers = buffers
        self._optimizer = optimizer
        self._executor = executor
        self._num_sources = num_sources if num_sources > 1 else 0
        self._timed: Timed = timed or (lambda name: nullcontext())
        self._replicas = Replicas(mesh, config.parallel, buffers, optimizer)
        self._amax = None
        if config.fp8.format != "off" and config.fp8.recipe == "delayed":
            layers = {name: scales for stage in stages.values() for name, scales in stage.delayed_scales().items()}
            self._amax = AmaxHistory(layers, config.fp8, mesh.group("tp", "cp", "dp"), mesh.backend.device)

    @property
    def world(self) -> Group:
        """All ranks."""
        return self._mesh.world

    @property
    def buffers(self) -> ParameterBuffers:
        """This rank's parameters and their gradients."""
        return self._buffers

    def train_step(self, plan: IterationPlan, read: BatchReader, rates: Rates | None = None) -> PendingStep:
        """Enqueue forwards, backwards, gradient reduction and step; no step is applied if the loss is not finite."""
        for stage in self._stages.values():
            stage.train()
        self._buffers.begin(plan.microbatches)
        phases, per_token = self._mesh.backend.phases, self._config.per_token_loss
        with phases.enter(self._executor), self._timed("forward-backward"):
            losses = self._executor.run(
                self._program(plan.microbatches, True),
                read,
                iteration=plan.iteration,
                seq_length=plan.seq_length,
                gradient_scale=self._optimizer.loss_scale / (plan.tokens if per_token else plan.global_batch),
            )
        with phases.enter("gradient reduction"), self._timed("all-grads-sync"):
            self._buffers.reduce()
            if self._amax is not None:
                self._amax.update()
        sums = reduce_losses(losses, self._num_sources, self._mesh)
        loss_is_finite = sums[0, 0].isfinite() if self._config.stops_at_nan else None
        with phases.enter("optimizer"), self._timed("optimizer"):
            lr, weight_decay = (plan.learning_rate, plan.weight_decay) if rates is None else rates()
            # Gradients were divided by all tokens; the number of unmasked ones is known on the device only.
            share = sums[1, 0].clamp(min=1.0) / plan.tokens if per_token else None
            step = self._optimizer.step(lr, weight_decay, loss_is_finite, share)
        reading = self._mesh.backend.read_later(torch.cat((sums.flatten(), step)))
        return EnqueuedStep(reading, sums.numel(), self._optimizer)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Exchange parameters and averages within the context."""
        return self._optimizer.averaged_weights()

    @torch.no_grad()
    def eval_step(self, microbatches: int, read: BatchReader, seq_length: int) -> LossSum:
        """Run forwards only, without dropout."""
        for stage in self._stages.values():
            stage.eval()
        with self._mesh.backend.phases.enter(self._executor):
            losses = self._executor.run(
                self._program(microbatches, False), read, iteration=0, seq_length=seq_length, gradient_scale=0.0
            )
        return read_losses(
            self._mesh.backend.read_later(reduce_losses(losses, self._num_sources, self._mesh).flatten())()
        )[0]

    def state_tensors(self) -> list[GlobalTensor]:
        """Return parameters under their own names, and the optimizer's state."""
        # Every replica has all parameters, and every tp rank those that are not split: the first of these is saved.
        replicas, first = self._mesh.replicas, self._mesh.tp.rank == 0
        weights = [
            parameter_tensor(parameter, write=replicas.rank == 0, replica=(replicas.rank, replicas.size))
            if first or parameter.tp_dim is not None
            else parameter_tensor(parameter, write=False)
            for parameter in self._buffers.parameters
            if parameter.owned
        ]
        copies = [parameter_tensor(p, write=False) for p in self._buffers.parameters if not p.owned]
        histories = [] if self._amax is None else self._amax.state_tensors(write=first and replicas.rank == 0)
        return [*weights, *copies, *self._optimizer.state_tensors(), *histories]

    def fill(self, read: Callable[[list[GlobalTensor]], T]) -> T:
        """Call `read` with the tensors of the state."""
        return read(self.state_tensors())

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's parameters, gradients and optimizer state, with padding."""
        buffers = self._buffers.buffers
        frozen = [parameter.param for parameter in self._buffers.parameters if not parameter.trained]
        return {
            "parameters": sum(flat.values.nbytes for flat in buffers) + sum(param.nbytes for param in frozen),
            "gradients": sum(flat.gradients.nbytes for flat in buffers),
            **self._optimizer.state_bytes(),
            **({"fp8 histories": self._amax.nbytes} if self._amax is not None else {}),
        }

    def state_scalars(self) -> dict[str, Any]:
        """Return step count and loss scale."""
        return self._optimizer.state_scalars()

    def load_scalars(self, scalars: dict[str, Any]) -> list[str]:
        """Restore the result of state_scalars."""
        self._optimizer.load_scalars(scalars)
        complete = self._amax is None or self._amax.resume()
        if all(self.world.all_gather_object(complete)):
            return []
        return [
            "the checkpoint has no history of fp8 maxima of this length for all layers: the first iteration takes "
            "the missing scales from its own values"
        ]

    def compare_replicas(self) -> list[Mismatch]:
        """Find parameters whose replicas differ."""
        return self._replicas.compare()

    def repair_replicas(self, mismatches: Sequence[Mismatch]) -> None:
        """Overwrite differing replicas."""
        self._replicas.repair(mismatches)

    def close(self) -> None:
        """Do nothing: there are no temporary files."""

    def _program(self, microbatches: int, backward: bool) -> tuple[Action, ...]:
        kind, pp = self._config.parallel.pipeline_schedule, self._mesh.pp
        return rank_program(kind, pp.size, pp.rank, microbatches, len(self._stages), backward)


@lru_cache(maxsize=64)
def rank_program(
    kind: PipelineKind, size: int, rank: int, microbatches: int, chunks: int, backward: bool
) -> tuple[Action, ...]:
    """Return the actions of one rank of a pipeline; without backward, those of an evaluation."""
    schedule = pipeline_schedule(kind, size, microbatches, chunks)
    if not backward:
        schedule = [[action for action in actions if action.kind == "F"] for actions in schedule]
    return tuple(lower(schedule, kind, chunks)[rank])


def reduce_losses(losses: StepLosses, num_sources: int, mesh: Mesh) -> Tensor:
    """Return loss_sums over all replicas; a collective call."""
    sums = loss_sums(losses, num_sources, mesh.backend)
    # All tp ranks of the last stage have the same losses: the first contributes them. Those of a sample are its parts
    # over cp, whose weight is the whole sample's: the first contributes it.
    if mesh.cp.rank:
        sums[1].zero_()
    if mesh.tp.rank:
        sums.zero_()
    mesh.world.all_reduce_(sums)
    return sums


def loss_sums(losses: StepLosses, num_sources: int, backend: Backend) -> Tensor:
    """Return sums of losses (row 0) and of weights (row 1) of all samples (column 0) and of data source n (1 + n).

    Args:
        losses: of micro-batches.
        num_sources: data sources of a blend; 0: there is only one.
        backend: of their device.

    Returns:
        [2, 1 + num_sources] on the device, in its dtype of sums.
    """
    dtype = backend.sum_dtype
    sums = torch.zeros(2, 1 + num_sources, dtype=dtype, device=backend.device)
    for samples, weights, sources in zip(losses.samples, losses.weights, losses.sources, strict=True):
        weights = torch.ones_like(samples) if weights is None else weights
        pairs = torch.stack((samples.to(dtype), weights.to(dtype)))
        sums[:, 0] += pairs.sum(1)
        if num_sources and sources is not None:
            sums.index_add_(1, 1 + backend.to_device(torch.tensor(sources)), pairs)
    return sums


class Settles(Protocol):
    """Optimizer whose steps are enqueued on the device."""

    def settle(self, values: Sequence[float], /) -> StepResult:
        """Return the result of a step from its values."""


@dataclass
class EnqueuedStep:
    """Enqueued iteration: values of losses, [num_losses], and of the optimizer's step."""

    reading: Reading
    num_losses: int
    optimizer: Settles

    def outcome(self) -> StepOutcome:
        """Wait for the values, and settle the optimizer's step."""
        values = self.reading()
        loss, by_source = read_losses(values[: self.num_losses])
        result = self.optimizer.settle(values[self.num_losses :])
        return StepOutcome(
            loss=loss.mean,
            source_losses=by_source,
            applied=result.applied,
            finite=result.finite and math.isfinite(loss.mean),
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            num_zeros=result.num_zeros,
            params_norm=result.params_norm,
        )


def read_losses(values: Sequence[float]) -> tuple[LossSum, dict[int, float]]:
    """Return the loss over all replicas, and the mean loss of each data source, from the values of loss_sums."""
    totals, counts = values[: len(values) // 2], values[len(values) // 2 :]
    means = {n - 1: totals[n] / counts[n] for n in range(1, len(totals)) if counts[n]}
    return LossSum(totals[0], int(counts[0])), means
