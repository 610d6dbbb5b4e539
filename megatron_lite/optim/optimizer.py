"""Mixed-precision optimizer: gradient norm, overflow check, clipping and update of a rank's parameter shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_lite.config.run import RunConfig
from megatron_lite.optim.average import WeightAverage
from megatron_lite.optim.element_sums import ElementSums
from megatron_lite.optim.loss_scaler import DynamicScaler, build_loss_scaler
from megatron_lite.optim.select import select_rule
from megatron_lite.optim.update_rule import PieceState, states_of_shards
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.rectangle import rectangles_of_range


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, equal on every rank.

    Attributes:
        applied: whether parameters were updated.
        finite: whether all gradients were finite. If not, the step is an overflow in fp16, to which the loss scale
            adapts; in bf16 and fp32 it is an error that the caller raises.
        loss_scale: factor on the loss of this iteration.
        grad_norm: 2-norm of all gradients, unscaled and before clipping.
        num_zeros: number of gradient elements equal to zero; None: not requested.
        params_norm: 2-norm of all trained parameters after the step; None: not requested.
    """

    applied: bool
    finite: bool
    loss_scale: float
    grad_norm: float
    num_zeros: int | None = None
    params_norm: float | None = None


class Optimizer:
    """Mixed-precision optimizer of this rank's shards: fp32 main parameters, update rule and loss scale.

    Args:
        config: optimizer, precision, and the statistics to report.
        buffers: parameters and gradients; their shards are updated.
        mesh: this rank's groups.
    """

    def __init__(self, config: RunConfig, buffers: ParameterBuffers, mesh: Mesh) -> None:
        shards = buffers.shards
        self._config = config
        self._buffers = buffers
        # A shard's own values are its main parameters if they are fp32.
        values = [shard.values.detach() for shard in shards]
        self._mains = [own if own.dtype == torch.float32 else own.float() for own in values]
        mains = [replace(shard, values=main) for shard, main in zip(shards, self._mains, strict=True)]
        self._rule = select_rule(config, mains, buffers, mesh)
        self._average = WeightAverage(config.optimizer.ema_decay, self._mains)
        self._scaler = build_loss_scaler(config.precision)
        self._applied = 0
        self._next_scale: Tensor | None = None
        group = mesh.world if buffers.sharded else mesh.group("tp", "pp")
        self._sums = ElementSums(shards, mesh.tp.rank, group, mesh.backend.device, mesh.backend.sum_dtype)
        # Index and number of the replicas that hold the same state.
        self._replica = (0, 1) if buffers.sharded else (mesh.replicas.rank, mesh.replicas.size)

    @property
    def loss_scale(self) -> Tensor | float:
        """Return the factor on the loss of the next iteration; a scalar on the device while a step is not settled."""
        return self._scaler.scale if self._next_scale is None else self._next_scale

    @torch.no_grad()
    def step(
        self,
        lr: float,
        weight_decay: float,
        loss_is_finite: Tensor | None = None,
        gradient_divisor: Tensor | None = None,
    ) -> Tensor:
        """Update the parameters with the reduced gradients; a collective call, after ParameterBuffers.reduce.

        Nothing is read on the host: whether the step is applied is decided on the device. The update unscales and clips
        the gradients as it reads them, in place. With a dynamic loss scale the step before must be settled.

        Args:
            lr: learning rate, of parameters with the factor 1 (--lr-factors).
            weight_decay: of the parameters that have weight decay.
            loss_is_finite: bool scalar on the device; False prevents the step as a non-finite gradient does.
            gradient_divisor: scalar on the device by which gradients are divided besides the loss scale; None: 1.

        Returns:
            [n] on the device, in its dtype of sums: the values of the step, for `settle`.
        """
        metrics, optimizer = self._config.metrics, self._config.optimizer
        gradients = [shard.gradients for shard in self._buffers.shards]
        sums = [self._sums.squares(gradients)]
        if metrics.log_num_zeros:
            sums.append(self._sums.zeros(gradients))
        squares, *values = self._sums.over_ranks(sums)
        scale = self._scaler.scale if gradient_divisor is None else gradient_divisor * self._scaler.scale
        norm = squares.sqrt() / scale
        finite = norm.isfinite()
        applies = finite if loss_is_finite is None else finite & loss_is_finite
        if not (self._config.precision.dtype == "fp16" or optimizer.check_for_nan):
            applies = torch.ones_like(finite)
        divisor = None
        if optimizer.clip_grad > 0 or gradient_divisor is not None or scale != 1.0:
            divisor = scale / clip_coefficient(norm, optimizer.clip_grad)
        if isinstance(self._scaler, DynamicScaler):
            assert self._next_scale is None, "the loss scale of this step is unknown: settle the step before it"
            scales = [torch.full_like(norm, self._scaler.after(overflow)) for overflow in (False, True)]
            self._next_scale = torch.where(finite, scales[0], scales[1])
        self._rule.step(lr, weight_decay, divisor, applies)
        self._average.update(applies)
        self._copy_mains_to_parameters()
        if metrics.log_params_norm:
            values.append(self._sums.over_ranks([self._sums.squares(self._mains)])[0].sqrt())
        return torch.stack([applies.to(norm.dtype), finite.to(norm.dtype), norm, *values])

    def settle(self, values: Sequence[float]) -> StepResult:
        """Adapt the loss scale and the count of steps to a step; return its result.

        Args:
            values: the values that `step` returned, read on the host. Steps are settled in their order.
        """
        applied, finite, norm, *more = values
        self._next_scale, scale = None, self._scaler.scale
        self._scaler.update(overflow=not finite)
        self._applied += int(applied)
        zeros = int(more.pop(0)) if self._config.metrics.log_num_zeros else None
        return StepResult(bool(applied), bool(finite), scale, norm, zeros, more[0] if more else None)

    def state_tensors(self) -> list[GlobalTensor]:
        """Return this rank's share of the state, to be saved from or loaded into.

        Names: optimizer.exp_avg.<parameter>, optimizer.exp_avg_sq.<parameter> and others by the update rule,
        optimizer.main_param.<parameter> unless the parameters themselves are fp32, and ema.<parameter>.
        """
        self._buffers.finish_gather()
        tensors = [*map(self._global, self._states()), *self._rule.vectors()]
        return [tensor for tensor in tensors if tensor.pieces]

    def states_of(self, parameter: NamedParameter) -> list[Tensor]:
        """Return this rank's share of one parameter's state, flat, to be written to before refresh_parameters."""
        own = [state.tensor for state in self._states() if state.piece.parameter is parameter]
        return own + self._rule.vectors_of(parameter)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's state by kind, with padding."""
        copies = [
            main
            for main, shard in zip(self._mains, self._buffers.shards, strict=True)
            if main.dtype != shard.values.dtype
        ]
        averages = self._average.values
        return {
            "main parameters": sum(main.nbytes for main in copies),
            "moments": self._rule.nbytes,
            **({"average": sum(average.nbytes for average in averages)} if averages else {}),
        }

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Replace the parameters by their moving averages within the context; a collective call under ZeRO-1."""
        self._average.swap()
        self.refresh_parameters()
        yield
        # Not after an error: other ranks may not take part in the gather, and the job ends.
        self._average.swap()
        self.refresh_parameters()

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Take over state written to; round the main parameters to the parameters' dtype again, and gather them.

        A collective call under ZeRO-1.
        """
        self._rule.adopt()
        self._copy_mains_to_parameters()
        self._buffers.finish_gather()

    def state_scalars(self) -> dict[str, Any]:
        """Return the number of steps and the loss scaler's counters, as JSON values."""
        return {"step": self._applied, "loss_scaler": {"kind": self._scaler.kind, **self._scaler.state()}}

    @torch.no_grad()
    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Restore the result of state_scalars; the state of a loss scaler of another kind is ignored."""
        self._applied = int(scalars["step"])
        self._rule.load(self._applied)
        scaler = scalars["loss_scaler"]
        if scaler["kind"] == self._scaler.kind:
            self._scaler.load(scaler)

    def _copy_mains_to_parameters(self) -> None:
        """Round the main parameters to the parameters' dtype, and start to gather them."""
        for main, shard in zip(self._mains, self._buffers.shards, strict=True):
            if main.dtype != shard.values.dtype:
                shard.values.copy_(main)
        self._buffers.gather()

    def _states(self) -> list[PieceState]:
        """Return main parameters (if they are copies), the rule's state and moving averages; names are prefixes."""
        shards = self._buffers.shards
        copies = [
            {"optimizer.main_param": main} if main.dtype != shard.values.dtype else {}
            for main, shard in zip(self._mains, shards, strict=True)
        ]
        rule = [replace(state, name=f"optimizer.{state.name}") for state in self._rule.states()]
        averages = [{"ema": average} for average in self._average.values] or [{}] * len(shards)
        return [*states_of_shards(shards, copies), *rule, *states_of_shards(shards, averages)]

    def _global(self, state: PieceState) -> GlobalTensor:
        piece, parameter = state.piece, state.piece.parameter
        local, begin = parameter.rectangle, 0
        pieces = []
        for block in rectangles_of_range(local.shape, min(piece.start, local.numel), min(piece.stop, local.numel)):
            view = state.tensor[begin : begin + block.numel].view(block.shape)
            pieces.append(Piece(block.shifted(local.offset).offset, view))
            begin += block.numel
        name, counts = f"{state.name}.{parameter.name}", self._sums.is_counted(parameter)
        replica = self._replica if counts else (0, 1)
        write = counts and replica[0] == 0
        return GlobalTensor(name, parameter.global_shape, state.tensor.dtype, pieces, write, replica)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that clips gradients of a norm (Megatron's and torch's rule); max_norm 0: no clipping."""
    if max_norm <= 0:
        return torch.ones_like(norm)
    coefficient = max_norm / (norm + 1e-6)
    return torch.where(coefficient < 1, coefficient, 1.0)  # 1 for a NaN
