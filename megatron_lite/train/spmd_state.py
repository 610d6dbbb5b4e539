"""State of the SPMD engine: partitioned parameters, their gradients, and AdamW or SGD on partitioned moments.

Each tensor is one global tensor of the job. Its partition over the device mesh follows from the dim that the parameter
declares as split by tensor parallelism; with ZeRO-1 the optimizer's state is split over dp as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megatron_lite.backend.xla import Spec, XlaBackend
from megatron_lite.config.run import RunConfig
from megatron_lite.optim.loss_scaler import ConstantScaler
from megatron_lite.optim.optimizer import StepResult, clip_coefficient
from megatron_lite.parallel.buffers import has_decay
from megatron_lite.parallel.gemm import weight_gradient
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.rectangle import Rectangle

T = TypeVar("T")


@dataclass(eq=False)
class Parameter:
    """Parameter on the devices, with its gradient and optimizer state.

    Attributes:
        named: name and place in the checkpoint; its tensors are on the devices.
        spec: partition of the parameter.
        state_spec: partition of gradient and state.
        state: fp32 tensors shaped like the parameter, by their names in checkpoints without the parameter's name.
        gradient: fp32 sum of this iteration's gradients; None: none has arrived.
    """

    named: NamedParameter
    spec: Spec
    state_spec: Spec
    state: dict[str, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """Return the fp32 main parameter: the parameter itself if it is fp32."""
        return self.state.get("optimizer.main_param", self.named.param)

    def tensors(self) -> Iterator[tuple[str, Tensor, Spec]]:
        """Yield the tensors that a checkpoint holds, with full name and partition."""
        name = self.named.name
        yield name, self.named.param, self.spec
        for kind, tensor in self.state.items():
            yield f"{kind}.{name}", tensor, self.state_spec


class SpmdState:
    """Parameters, gradients and optimizer of the SPMD engine.

    Args:
        config: optimizer, precision, and the statistics to report.
        parameters: of the whole model, on the devices.
        backend: the devices.
    """

    loss_scale = 1.0

    def __init__(self, config: RunConfig, parameters: Sequence[NamedParameter], backend: XlaBackend) -> None:
        self._config = config
        self._backend = backend
        self._applied = 0
        zero = config.parallel.distributed_optimizer
        self.parameters = [self._build(parameter, zero=zero) for parameter in parameters]
        self._trained = [parameter for parameter in self.parameters if parameter.named.trained]
        self._owner = {id(use): parameter for parameter in self._trained for use in parameter.named.uses}
        for use in (use for parameter in self._trained for use in parameter.named.uses):
            use.register_post_accumulate_grad_hook(self._take_gradient)

    def accumulate_product(
        self, weight: nn.Parameter, gradient: Tensor, x: Tensor, /, *, last: bool = True, fp8: Any = None
    ) -> None:
        """Add gradientᵀ x to the gradient of a weight [o, i]: `gradient` [..., o], `x` [..., i]."""
        self._accumulate(weight, weight_gradient(gradient, x))

    @torch.no_grad()
    def step(
        self, lr: float, weight_decay: float, loss_is_finite: Tensor | None, gradient_divisor: Tensor | None
    ) -> Tensor:
        """Update the parameters with the gradients of the iteration, and clear these.

        Args:
            lr: learning rate, of parameters with the factor 1 (--lr-factors).
            weight_decay: of the parameters that have weight decay.
            loss_is_finite: bool scalar on the devices; False prevents the step, as a non-finite gradient does.
            gradient_divisor: scalar on the devices by which gradients are divided; None: 1.

        Returns:
            [n] on the devices: the values of the step, for `settle`.
        """
        metrics, optimizer = self._config.metrics, self._config.optimizer
        gradients = [self._gradient(parameter) for parameter in self._trained]
        divisor = torch.ones((), device=self._backend.device) if gradient_divisor is None else gradient_divisor.float()
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt() / divisor
        finite = norm.isfinite()
        applies = finite if loss_is_finite is None else finite & loss_is_finite
        if not optimizer.check_for_nan:
            applies = torch.ones_like(finite)
        factor = clip_coefficient(norm, optimizer.clip_grad) / divisor
        self._applied += 1
        # As tensors: numbers that change from step to step must not be constants of the graph.
        rates = self._backend.place(torch.tensor(self._rates(lr, weight_decay)), (None,)).unbind()
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            self._update(parameter, gradient * factor, rates, applies)
            parameter.gradient = None
        values = [applies, finite, norm]
        if metrics.log_num_zeros:
            values.append(self._zeros(gradients))
        if metrics.log_params_norm:
            values.append(torch.stack([parameter.main.square().sum() for parameter in self._trained]).sum().sqrt())
        return torch.stack([value.double() for value in values])

    def settle(self, values: Sequence[float]) -> StepResult:
        """Return the result of a step from the values that it returned, read on the host."""
        applied, finite, norm, *more = values
        zeros = int(more.pop(0)) if self._config.metrics.log_num_zeros else None
        return StepResult(bool(applied), bool(finite), self.loss_scale, norm, zeros, more[0] if more else None)

    def state_scalars(self) -> dict[str, Any]:
        """Return the number of steps, in the form of the native optimizer."""
        return {"step": self._applied, "loss_scaler": {"kind": ConstantScaler.kind}}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Restore the result of state_scalars."""
        self._applied = int(scalars["step"])

    def saved_tensors(self) -> list[GlobalTensor]:
        """Return copies in host memory of this host's parts of all tensors."""
        found = []
        for parameter in self.parameters:
            for name, tensor, _ in parameter.tensors():
                shards = self._backend.local_shards(tensor)
                # The parts of a tensor that several hosts hold are saved by the first of them.
                pieces = [
                    piece
                    for shard in shards
                    if shard.first
                    for piece in _pieces(parameter.named, shard.offset, shard.data)
                ]
                found.append(_global(parameter.named, name, tensor.dtype, pieces))
        return found

    @torch.no_grad()
    def load(self, fill: Callable[[list[GlobalTensor]], T]) -> T:
        """Replace all tensors by what `fill` writes to copies of this host's parts in host memory.

        If `fill` raises, nothing is replaced.
        """
        copies, tensors = [], []
        for parameter in self.parameters:
            for name, tensor, spec in parameter.tensors():
                copy = torch.zeros(tensor.shape, dtype=tensor.dtype)
                pieces = []
                for shard in self._backend.local_shards(tensor):
                    part = copy[tuple(slice(a, a + n) for a, n in zip(shard.offset, shard.data.shape, strict=True))]
                    part.copy_(shard.data)
                    pieces += _pieces(parameter.named, shard.offset, part)
                copies.append((tensor, copy, spec))
                tensors.append(_global(parameter.named, name, tensor.dtype, pieces))
        result = fill(tensors)
        for tensor, copy, spec in copies:
            tensor.data = self._backend.place(copy, spec)
        self._refresh_aliases()
        return result

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of parameters and optimizer state over all devices, each part counted once."""
        state = [tensor for parameter in self.parameters for tensor in parameter.state.values()]
        return {
            "parameters": sum(parameter.named.param.nbytes for parameter in self.parameters),
            "optimizer": sum(tensor.nbytes for tensor in state),
        }

    def _build(self, named: NamedParameter, *, zero: bool) -> Parameter:
        spec = partition_spec(named)
        state_spec = _split_over_dp(spec, named.param.shape, self._backend.axis_size("dp")) if zero else spec
        parameter = Parameter(named, spec, state_spec)
        if not named.trained:
            return parameter
        if named.param.dtype != torch.float32:
            main = named.param.detach().cpu().float()
            parameter.state["optimizer.main_param"] = self._backend.place(main, state_spec)
        optimizer = self._config.optimizer
        names = (
            ["exp_avg", "exp_avg_sq"] if optimizer.kind == "adam" else ["momentum"] if optimizer.sgd_momentum else []
        )
        for name in names:
            zeros = torch.zeros(named.param.shape, dtype=torch.float32)
            parameter.state[f"optimizer.{name}"] = self._backend.place(zeros, state_spec)
        return parameter

    def _take_gradient(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter) and param.grad is not None
        gradient, param.grad = param.grad, None
        self._accumulate(param, gradient)

    @torch.no_grad()
    def _accumulate(self, param: nn.Parameter, gradient: Tensor) -> None:
        parameter = self._owner[id(param)]
        total = gradient.float() if parameter.gradient is None else parameter.gradient + gradient
        # With ZeRO-1 the sum over replicas is a reduce-scatter.
        parameter.gradient = self._backend.partition(total, parameter.state_spec)

    def _gradient(self, parameter: Parameter) -> Tensor:
        if parameter.gradient is None:
            return torch.zeros_like(parameter.named.param, dtype=torch.float32)
        return parameter.gradient

    def _rates(self, lr: float, weight_decay: float) -> list[float]:
        """Return learning rate, weight decay, and Adam's bias corrections of the step."""
        optimizer = self._config.optimizer
        corrections = [1 - beta**self._applied for beta in (optimizer.adam_beta1, optimizer.adam_beta2)]
        return [lr, weight_decay, corrections[0], math.sqrt(corrections[1])]

    def _update(self, parameter: Parameter, gradient: Tensor, rates: Sequence[Tensor], applies: Tensor) -> None:
        """Update a parameter and its state in place by AdamW (Loshchilov & Hutter 2019) or SGD, as torch does."""
        optimizer, state, main = self._config.optimizer, parameter.state, parameter.main
        lr, weight_decay, correction1, correction2 = rates
        lr = lr * parameter.named.lr_factor
        decays = has_decay(parameter.named)
        updated: dict[str, Tensor] = {}
        if optimizer.kind == "adam":
            first, second = state["optimizer.exp_avg"], state["optimizer.exp_avg_sq"]
            first = first + (gradient - first) * (1 - optimizer.adam_beta1)
            second = second * optimizer.adam_beta2 + gradient.square() * (1 - optimizer.adam_beta2)
            updated = {"optimizer.exp_avg": first, "optimizer.exp_avg_sq": second}
            new = main * (1 - lr * weight_decay) if decays else main
            new = new - lr / correction1 * first / (second.sqrt() / correction2 + optimizer.adam_eps)
        else:
            gradient = gradient + main * weight_decay if decays else gradient
            if optimizer.sgd_momentum:
                # torch begins with the first gradient, which equals a momentum that begins at 0.
                gradient = state["optimizer.momentum"] * optimizer.sgd_momentum + gradient
                updated["optimizer.momentum"] = gradient
            new = main - lr * gradient
        for name, value in updated.items():
            state[name].copy_(torch.where(applies, value, state[name]))
        new = torch.where(applies, new, main)
        main.copy_(new)
        if main is not parameter.named.param:
            # Not from `main`, whose partition is another one.
            parameter.named.param.copy_(new.to(parameter.named.param.dtype))
        self._refresh_aliases(parameter)

    def _refresh_aliases(self, *parameters: Parameter) -> None:
        """Let layers that share a parameter see its new values."""
        for parameter in parameters or self.parameters:
            for alias in parameter.named.aliases:
                alias.data = parameter.named.param.data

    def _zeros(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the number of gradient elements equal to zero, without padded vocabulary rows."""
        padding = sum(p.named.param.numel() - math.prod(p.named.global_shape) for p in self._trained)
        return torch.stack([(gradient == 0).sum() for gradient in gradients]).sum() - padding


def partition_spec(named: NamedParameter) -> Spec:
    """Return the partition of a parameter: the dim that it declares as split by tensor parallelism, over tp.

    A dim of the global shape that the parameter's tensor merges with the one before (gate and up projection) is split
    in the merged order. XLA moves what an operation needs elsewhere.
    """
    dims = named.param.dim()
    split = None if named.tp_dim is None else named.tp_dim - (len(named.global_shape) - dims)
    return tuple("tp" if dim == split else None for dim in range(dims))


def _split_over_dp(spec: Spec, shape: Sequence[int], dp: int) -> Spec:
    """Return the spec with the first dim that is free and divisible by dp split over dp; unchanged if there is none."""
    free = [dim for dim, axis in enumerate(spec) if axis is None and shape[dim] % dp == 0]
    return tuple("dp" if free and dim == free[0] else axis for dim, axis in enumerate(spec))


def _pieces(named: NamedParameter, offset: Sequence[int], tensor: Tensor) -> list[Piece]:
    """Return the pieces of the global tensor in a part of the parameter's tensor: views without padding.

    Args:
        named: the parameter; its global shape may have fewer rows (padded vocabulary), or its first dim as two.
        offset: of the part.
        tensor: the part.
    """
    shape = named.global_shape
    if len(shape) == tensor.dim():
        rows = min(tensor.shape[0], max(0, shape[0] - offset[0])) if shape else 0
        return [Piece(tuple(offset), tensor[:rows])] if rows else []
    pieces = []
    own = Rectangle((offset[0],), (tensor.shape[0],))
    for number in range(shape[0]):
        found = own.intersection(Rectangle((number * shape[1],), (shape[1],)))
        if found is not None:
            begin, rows = found.offset[0], found.shape[0]
            view = tensor[begin - offset[0] :][:rows].unsqueeze(0)
            pieces.append(Piece((number, begin - number * shape[1], *offset[1:]), view))
    return pieces


def _global(named: NamedParameter, name: str, dtype: torch.dtype, pieces: list[Piece]) -> GlobalTensor:
    return GlobalTensor(name, named.global_shape, dtype, pieces, write=bool(pieces))
