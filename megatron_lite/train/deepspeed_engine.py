"""DeepSpeed engine: forward, backward and optimizer step of one rank through a DeepSpeedEngine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_lite.backend.group import Group
from megatron_lite.config.run import RunConfig
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.optim.element_sums import squares_of
from megatron_lite.optim.loss_scaler import DivergedError, build_loss_scaler
from megatron_lite.optim.optimizer import clip_coefficient
from megatron_lite.optim.replicas import Mismatch
from megatron_lite.optim.update_rule import set_rates
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.pipeline.executor import StepLosses, Timed
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.microbatches import num_microbatches
from megatron_lite.train.deepspeed_model import LossScales
from megatron_lite.train.deepspeed_state import OptimizerState
from megatron_lite.train.deepspeed_swap import SwapFolders, explain_missing_buffers
from megatron_lite.train.engine import BatchReader, LossSum, PendingStep, Rates, StepOutcome
from megatron_lite.train.native import read_losses, reduce_losses

T = TypeVar("T")

NO_SCALES = LossScales(0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Parts:
    """What an engine consists of.

    Attributes:
        engine: DeepSpeed's, around the LossModel.
        optimizer: torch's optimizer that DeepSpeed steps.
        stage: the model.
        parameters: of this rank.
        rng: dropout streams.
        swap: folders of swap files; None: nothing is offloaded to NVMe.
    """

    engine: Any
    optimizer: torch.optim.Optimizer
    stage: GPTStage
    parameters: Sequence[NamedParameter]
    rng: RngStreams
    swap: SwapFolders | None = None


class DeepSpeedEngine:
    """Trains this rank's model; the methods are documented in Engine.

    ZeRO stages 2 and 3 communicate in each forward or backward, so that all replicas run equally many micro-batches:
    those with fewer run micro-batches of token 0 whose loss counts nothing.

    Args:
        config: the run.
        mesh: this rank's groups.
        parts: model, optimizer and DeepSpeed's engine.
        num_sources: data sources of a blend, for the loss of each.
        timed: measures the parts of a step; None: no timing.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, parts: Parts, num_sources: int, timed: Timed | None = None
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._engine = parts.engine
        self._optimizer = parts.optimizer
        self._model = parts.stage
        self._parameters = parts.parameters
        self._rng = parts.rng
        self._swap = parts.swap
        self._num_sources = num_sources if num_sources > 1 else 0
        self._timed: Timed = timed or (lambda name: nullcontext())
        self._stage = config.deepspeed.stage
        self._state = OptimizerState(parts.engine.optimizer, parts.optimizer, self._stage, parts.parameters, mesh)
        self._scaler = build_loss_scaler(config.precision)
        self._applied = 0
        self._phase = ""

    def __str__(self) -> str:
        return self._phase

    @property
    def world(self) -> Group:
        """All ranks."""
        return self._mesh.world

    def train_step(self, plan: IterationPlan, read: BatchReader, rates: Rates | None = None) -> PendingStep:
        """Run forwards, backwards and the step; no step is applied if the loss is not finite."""
        phases = self._mesh.backend.phases
        self._engine.train()
        scale = self._scaler.scale
        if self._config.precision.dtype == "fp16":
            self._engine.optimizer.override_loss_scale(scale)
        with phases.enter(self), self._timed("forward-backward"), explain_missing_buffers():
            losses = self._run(plan, read, scale)
        sums = reduce_losses(losses, self._num_sources, self._mesh)
        with phases.enter("optimizer (DeepSpeed)"), self._timed("optimizer"):
            lr, weight_decay = (plan.learning_rate, plan.weight_decay) if rates is None else rates()
            set_rates(self._optimizer, lr, weight_decay)
            loss, by_source = read_losses(sums.flatten().tolist())
            if self._config.stops_at_nan and not math.isfinite(loss.mean):
                applied, norm = False, math.nan
            else:
                applied, norm = self._step()
        self._applied += applied
        params_norm = math.sqrt(self._state.squared_norm().item()) if self._config.metrics.log_params_norm else None
        finite = math.isfinite(norm)
        return _Finished(
            StepOutcome(
                loss=loss.mean,
                source_losses=by_source,
                applied=applied,
                finite=finite and math.isfinite(loss.mean),
                grad_norm=norm,
                loss_scale=scale,
                params_norm=params_norm,
            ),
            self._update_scale(overflow=not finite),
        )

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Do nothing: --ema-decay is refused."""
        return nullcontext()

    @torch.no_grad()
    def eval_step(self, microbatches: int, read: BatchReader, seq_length: int) -> LossSum:
        """Run forwards only, without dropout."""
        self._engine.eval()
        most = torch.tensor([microbatches], device=self._mesh.backend.device)
        self._mesh.dp.all_reduce_(most, "max")
        losses = StepLosses()
        with self._mesh.backend.phases.enter(self), explain_missing_buffers():
            for index in range(int(most.item())):
                self._phase = f"forward of micro-batch {index}"
                batch = read(index) if index < microbatches else self._empty(seq_length)
                self._rng.set_microbatch(0, batch.number)
                samples = self._engine(batch, NO_SCALES)[1]
                if index < microbatches:
                    self._record(losses, samples, batch)
        return read_losses(reduce_losses(losses, self._num_sources, self._mesh).flatten().tolist())[0]

    def state_tensors(self) -> list[GlobalTensor]:
        """Return parameters under their own names, and the optimizer's state."""
        return self._state.tensors()

    def fill(self, read: Callable[[list[GlobalTensor]], T]) -> T:
        """Call `read` with the tensors of the state, and take over what it wrote."""
        result = read(self.state_tensors())
        self._state.adopt()
        return result

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's optimizer state, with padding."""
        return self._state.state_bytes()

    def state_scalars(self) -> dict[str, Any]:
        """Return step count and loss scale, as the native engine does."""
        return {"step": self._applied, "loss_scaler": {"kind": self._scaler.kind, **self._scaler.state()}}

    def load_scalars(self, scalars: dict[str, Any]) -> list[str]:
        """Restore the result of state_scalars, of either engine."""
        self._applied = int(scalars["step"])
        self._state.set_step(self._applied)
        if scalars["loss_scaler"]["kind"] == self._scaler.kind:
            self._scaler.load(scalars["loss_scaler"])
        return []

    def compare_replicas(self) -> list[Mismatch]:
        """Return none: DeepSpeed broadcasts the initial weights, and later checks are refused."""
        return []

    def repair_replicas(self, mismatches: Sequence[Mismatch]) -> None:
        """Do nothing: no mismatch is found."""

    def close(self) -> None:
        """Remove the swap files."""
        if self._swap is not None:
            self._swap.close()

    def _run(self, plan: IterationPlan, read: BatchReader, scale: float) -> StepLosses:
        """Run all forwards and backwards of an iteration."""
        losses = StepLosses()
        size, replicas = self._config.batch.micro_batch_size, self._mesh.replicas.size
        count = num_microbatches(plan.global_batch, size, self._mesh.dp.size, 0)
        fetch: Callable[[int], MicroBatch] = read
        total = float(plan.global_batch)
        if self._config.per_token_loss:
            # DeepSpeed may clip and reduce before the number of unmasked tokens is known: read all batches first.
            self._phase = "reading data"
            with self._timed("batch-generator"):
                batches = [read(index) for index in range(plan.microbatches)]
            fetch, total = batches.__getitem__, self._count_tokens(batches)
        for index in range(count):
            real = index < plan.microbatches
            self._phase = "reading data"
            with self._timed("batch-generator"):
                batch = fetch(index) if real else self._empty(plan.seq_length)
            self._rng.set_microbatch(plan.iteration, batch.number)
            self._engine.set_gradient_accumulation_boundary(index == count - 1)
            self._phase = f"forward of micro-batch {index}"
            with self._timed("forward-compute"):
                loss, samples = self._engine(batch, LossScales(replicas / total if real else 0.0, scale))
            self._phase = f"backward of micro-batch {index}"
            with self._timed("backward-compute"):
                self._engine.backward(loss, scale_wrt_gas=False)
            if real:
                self._record(losses, samples, batch)
        return losses

    def _count_tokens(self, batches: Sequence[MicroBatch]) -> float:
        """Return the unmasked tokens of the global batch, at least 1."""
        backend = self._mesh.backend
        total = torch.zeros((), dtype=backend.sum_dtype, device=backend.device)
        for batch in batches:
            weights = self._model.sample_weights(batch)
            total += 0.0 if weights is None else weights.to(total.dtype).sum()
        self._mesh.dp.all_reduce_(total)
        return max(total.item(), 1.0)

    def _record(self, losses: StepLosses, samples: Tensor, batch: MicroBatch) -> None:
        losses.samples.append(samples)
        losses.weights.append(self._model.sample_weights(batch))
        losses.sources.append(batch.sources)

    def _empty(self, length: int) -> MicroBatch:
        """Return a micro-batch of token 0, whose loss counts nothing."""
        tokens = torch.zeros(
            (self._config.batch.micro_batch_size, length), dtype=torch.int64, device=self._mesh.backend.device
        )
        return MicroBatch(tokens, tokens)

    def _step(self) -> tuple[bool, float]:
        """Step the optimizer; return whether the step was applied, and the norm of the gradient before clipping."""
        if self._stage == 0:
            return self._step_unsharded()
        self._engine.step()
        zero = self._engine.optimizer
        if zero.overflow:
            return False, math.inf
        return True, float(zero._global_grad_norm)

    @torch.no_grad()
    def _step_unsharded(self) -> tuple[bool, float]:
        """Clip and step torch's optimizer, whose gradients DeepSpeed has reduced."""
        backend = self._mesh.backend
        squares = torch.zeros((), dtype=backend.sum_dtype, device=backend.device)
        gradients = []
        for parameter in self._parameters:
            if parameter.trained and parameter.param.grad is not None:
                gradients.append(parameter.param.grad)
                if parameter.tp_dim is not None or self._mesh.tp.rank == 0:
                    squares += squares_of(parameter.param.grad.flatten(), squares.dtype)
        self._mesh.tp.all_reduce_(squares)
        norm = squares.sqrt()
        if self._config.stops_at_nan and not norm.isfinite():
            return False, norm.item()
        factor = clip_coefficient(norm, self._config.optimizer.clip_grad).float()
        for gradient in gradients:
            gradient.mul_(factor)
        self._engine.step()
        return True, norm.item()

    def _update_scale(self, *, overflow: bool) -> DivergedError | None:
        """Adapt the loss scale; return the error of a scale that cannot fall any more."""
        try:
            self._scaler.update(overflow)
        except DivergedError as error:
            return error
        return None


@dataclass(frozen=True)
class _Finished:
    """Iteration that has ended."""

    result: StepOutcome
    error: DivergedError | None

    def outcome(self) -> StepOutcome:
        """Return the result."""
        if self.error is not None:
            raise self.error
        return self.result
