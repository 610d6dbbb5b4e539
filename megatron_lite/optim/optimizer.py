"""Mixed-precision optimizer: norm, overflow check, clipping and update of a rank's parameter shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.config.run import RunConfig
from megatron_lite.optim.loss_scaler import LossScaler, build_loss_scaler
from megatron_lite.optim.measure import Measure
from megatron_lite.optim.update_rule import UpdateRule
from megatron_lite.parallel.buffers import ParameterBuffers, Shard, ShardPiece
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.rectangle import rectangles_of_range


@dataclass(frozen=True)
class StepResult:
    """What one step did, equal on every rank.

    Attributes:
        applied: whether parameters changed.
        finite: whether all gradients were. In fp16 a step that is not finite is an overflow, which the loss scale
            answers; in bf16 and fp32 it is an error, and the caller's to raise.
        grad_norm: 2-norm of all gradients, unscaled and before clipping.
        num_zeros: gradient elements that are zero; None unless asked for.
        params_norm: 2-norm of all parameters after the step; None unless asked for.
    """

    applied: bool
    finite: bool
    grad_norm: float
    num_zeros: int | None = None
    params_norm: float | None = None


@dataclass(frozen=True)
class ParameterState:
    """Optimizer state of a parameter's elements [start, stop): main parameter (if it is a copy) and moments."""

    start: int
    stop: int
    tensors: tuple[Tensor, ...]


class Optimizer:
    """Steps the parameters of this rank that are its to step, and keeps their state.

    Args:
        buffers: parameters and gradients. Their shards are what is stepped here.
        mains: for each shard its fp32 main parameters: the shard's own values if those are fp32, or a copy.
        rule: the update rule over `mains`.
        scaler: the loss scale.
        measure: sums over the model's elements.
        clip_grad: largest gradient norm; 0: no clipping.
        skip_nonfinite: leave the parameters alone if a gradient is not finite.
        count_zeros: report num_zeros.
        measure_params: report params_norm.
        replica: (i, n): this rank is the i-th of n that hold the same state.
    """

    def __init__(
        self,
        buffers: ParameterBuffers,
        mains: Sequence[Tensor],
        rule: UpdateRule,
        scaler: LossScaler,
        measure: Measure,
        *,
        clip_grad: float,
        skip_nonfinite: bool = True,
        count_zeros: bool = False,
        measure_params: bool = False,
        replica: tuple[int, int] = (0, 1),
    ) -> None:
        self._buffers = buffers
        self._mains = tuple(mains)
        self._rule = rule
        self._scaler = scaler
        self._measure = measure
        self._clip_grad = clip_grad
        self._skip_nonfinite = skip_nonfinite
        self._count_zeros = count_zeros
        self._measure_params = measure_params
        self._replica = replica

    @property
    def loss_scale(self) -> float:
        """What the loss of the next iteration is to be multiplied by."""
        return self._scaler.scale

    def zero_grad(self) -> None:
        """Sets all gradients to zero."""
        self._buffers.zero_grad()

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float) -> StepResult:
        """Steps with the reduced gradients (after ParameterBuffers.reduce), which it leaves unscaled and clipped.

        Args:
            lr: learning rate of this step.
            weight_decay: of this step, for parameters that are decayed.
        """
        gradients = [shard.gradients for shard in self._buffers.shards]
        sums = [self._measure.squares(gradients)]
        if self._count_zeros:
            sums.append(self._measure.zeros(gradients))
        squares, *zeros = self._measure.over_ranks(sums)
        scale = self._scaler.scale
        norm = math.sqrt(squares) / scale
        finite = math.isfinite(norm)
        self._scaler.update(overflow=not finite)
        applied = finite or not self._skip_nonfinite
        if applied:
            self._apply(lr, weight_decay, factor=clip_coefficient(norm, self._clip_grad) / scale)
        return StepResult(
            applied=applied,
            finite=finite,
            grad_norm=norm,
            num_zeros=int(zeros[0]) if zeros else None,
            params_norm=self.params_norm() if self._measure_params else None,
        )

    @torch.no_grad()
    def params_norm(self) -> float:
        """2-norm of all main parameters of the model. A collective call."""
        return math.sqrt(self._measure.over_ranks([self._measure.squares(self._mains)])[0])

    def state_tensors(self) -> list[GlobalTensor]:
        """This rank's share of the state as views, to be saved from or loaded into.

        Named optimizer.exp_avg.<parameter>, optimizer.exp_avg_sq.<parameter> (or optimizer.momentum.<parameter>), and
        optimizer.main_param.<parameter> unless the model's own parameters are the main ones.
        """
        self._buffers.finish_gather()
        tensors: list[GlobalTensor] = []
        for shard, main, moments in zip(self._buffers.shards, self._mains, self._rule.moments, strict=True):
            states = dict(moments) if main.dtype == shard.values.dtype else {"main_param": main, **moments}
            for piece in shard.pieces:
                tensors += [self._global(f"optimizer.{name}", state, piece) for name, state in states.items()]
        return [tensor for tensor in tensors if tensor.pieces]

    def states_of(self, parameter: NamedParameter) -> list[ParameterState]:
        """Return this rank's share of one parameter's state, as views to be written to."""
        found = []
        for shard, main, moments in zip(self._buffers.shards, self._mains, self._rule.moments, strict=True):
            states = ([] if main.dtype == shard.values.dtype else [main]) + list(moments.values())
            for piece in shard.pieces:
                if piece.parameter is parameter:
                    end = piece.position + piece.stop - piece.start
                    views = tuple(state[piece.position : end] for state in states)
                    found.append(ParameterState(piece.start, piece.stop, views))
        return found

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Round the main parameters to the model's dtype once more, and gather them; a collective call under ZeRO-1."""
        self._hand_back()
        self._buffers.finish_gather()

    def state_scalars(self) -> dict[str, Any]:
        """The rest of the state, as JSON values."""
        return {"step": self._rule.applied, "loss_scaler": {"kind": self._scaler.kind, **self._scaler.state()}}

    @torch.no_grad()
    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Takes over the result of state_scalars. A loss scaler of another kind is ignored."""
        self._rule.applied = int(scalars["step"])
        scaler = scalars["loss_scaler"]
        if scaler["kind"] == self._scaler.kind:
            self._scaler.load(scaler)

    def _apply(self, lr: float, weight_decay: float, factor: float) -> None:
        shards = self._buffers.shards
        if factor != 1.0:
            for shard in shards:
                shard.gradients.mul_(factor)
        self._rule.step(lr, weight_decay)
        self._hand_back()

    def _hand_back(self) -> None:
        """Give the model's parameters the values of the main parameters."""
        for main, shard in zip(self._mains, self._buffers.shards, strict=True):
            if main.dtype != shard.values.dtype:
                shard.values.copy_(main)
        self._buffers.gather()

    def _global(self, prefix: str, state: Tensor, piece: ShardPiece) -> GlobalTensor:
        parameter = piece.parameter
        local, begin = parameter.rectangle, piece.position
        pieces = []
        for block in rectangles_of_range(local.shape, min(piece.start, local.numel), min(piece.stop, local.numel)):
            view = state[begin : begin + block.numel].view(block.shape)
            pieces.append(Piece(block.shifted(local.offset).offset, view))
            begin += block.numel
        name, counts = f"{prefix}.{parameter.name}", self._measure.counts(parameter)
        replica = self._replica if counts else (0, 1)
        write = counts and replica[0] == 0
        return GlobalTensor(name, parameter.global_shape, state.dtype, pieces, write, replica)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Factor on gradients of that norm (Megatron's and torch's rule); 1 if it is within max_norm, or max_norm is 0."""
    if max_norm <= 0:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    return coefficient if coefficient < 1 else 1.0


def build_optimizer(config: RunConfig, buffers: ParameterBuffers, mesh: Mesh) -> Optimizer:
    """Makes the optimizer of this rank for the parameters in `buffers`."""
    mains = [_main(shard) for shard in buffers.shards]
    for main, shard in zip(mains, buffers.shards, strict=True):
        main.grad = shard.gradients
    rule = UpdateRule(
        config.optimizer,
        mains,
        [shard.decay for shard in buffers.shards],
        fused=mesh.backend.capabilities().fused_adam and not mains[0].is_meta,
    )
    return Optimizer(
        buffers,
        mains,
        rule,
        build_loss_scaler(config.precision),
        Measure(buffers.shards, mesh.tp.rank, mesh.world if buffers.sharded else mesh.group("tp", "pp")),
        clip_grad=config.optimizer.clip_grad,
        skip_nonfinite=config.precision.dtype == "fp16" or config.optimizer.check_for_nan,
        count_zeros=config.metrics.log_num_zeros,
        measure_params=config.metrics.log_params_norm,
        replica=(0, 1) if buffers.sharded else (mesh.dp.rank, mesh.dp.size),
    )


def _main(shard: Shard) -> Tensor:
    values = shard.values.detach()
    return values if values.dtype == torch.float32 else values.float()
