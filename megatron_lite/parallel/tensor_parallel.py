"""Tensor-parallel autograd functions: column- and row-parallel linear, and collectives with their gradients.

The collectives are Megatron's g (Shoeybi et al. 2019, arXiv:1909.08053, fig. 3) and its sequence-parallel version
(Korthikanti et al. 2022, arXiv:2205.05198, fig. 5). Megatron's f is part of the linear functions, where it overlaps
with the weight gradient. Sequence collectives run along dim 0, where [s, b, h] splits without a copy. All functions are
identities, or a plain linear, on a group of one rank, and can be traced by torch.compile.

Letters: s sequence, b micro-batch, i and o input and output channels, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from megatron_lite.backend.group import Group, Work
from megatron_lite.parallel.fp8 import Fp8
from megatron_lite.parallel.gemm import WeightGradients, input_gradient, linear, weight_gradient

_Deferral = tuple[WeightGradients, nn.Parameter]
"""What takes the operands of a weight gradient, and the weight's parameter."""


def column_parallel_linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool,
    deferred: WeightGradients | None = None,
    fp8: Fp8 | None = None,
) -> Tensor:
    """Return x Wᵀ + b, where each rank holds some rows of W (output channels).

    Args:
        x: [s, b, i], the same on every rank; under sequence parallelism this rank's [s/tp, b, i].
        weight: [o/tp, i].
        bias: [o/tp] or None.
        group: the tensor-parallel group.
        sequence_parallel: whether `x` is split along the sequence; it is all-gathered first.
        deferred: takes the weight gradient's operands; None: backward computes the weight gradient.
        fp8: formats of the products; None: the dtype of `x`.

    Returns:
        [s, b, o/tp].
    """
    if deferred is not None and _can_defer(x, weight):
        # The weight is detached: autograd would otherwise call the weight's hooks without a gradient.
        return _outside_graph(
            _ColumnParallelLinear, x, weight.detach(), bias, group, sequence_parallel, (deferred, weight), fp8
        )
    if group.size == 1 and fp8 is None:
        return linear(x, weight, bias)
    return _ColumnParallelLinear.apply(x, weight, bias, group, sequence_parallel, None, fp8)


def row_parallel_linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool,
    deferred: WeightGradients | None = None,
    fp8: Fp8 | None = None,
) -> Tensor:
    """Return x Wᵀ + b, where each rank holds some columns of W (input channels): the sum of every rank's product.

    Args:
        x: [s, b, i/tp].
        weight: [o, i/tp].
        bias: [o] or None, the same on every rank; added once, after the sum.
        group: the tensor-parallel group.
        sequence_parallel: whether the result is split along the sequence.
        deferred: as for column_parallel_linear.
        fp8: as for column_parallel_linear.

    Returns:
        [s, b, o], the same on every rank; under sequence parallelism this rank's [s/tp, b, o].
    """
    if deferred is not None and _can_defer(x, weight):
        y = _outside_graph(_RowParallelLinear, x, weight.detach(), group, sequence_parallel, (deferred, weight), fp8)
    elif group.size == 1 and fp8 is None:
        return linear(x, weight, bias)
    else:
        y = _RowParallelLinear.apply(x, weight, group, sequence_parallel, None, fp8)
    return y if bias is None else y + bias


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Return the sum of every rank's `x`, shaped like it; the gradient passes unchanged (Megatron's g)."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Return this rank's [s/tp, ...] of the sum of every rank's `x` [s, ...]; backward all-gathers the gradient."""
    return x if group.size == 1 else _ReduceScatterSequence.apply(x, group)


def local_slice(x: Tensor, group: Group) -> Tensor:
    """Return this rank's [s/tp, ...] of `x` [s, ...], a view.

    The gradient of `x` is zero outside of the slice: it must be summed over the group.
    """
    if group.size == 1:
        return x
    length = x.shape[0] // group.size
    return x.narrow(0, group.rank * length, length)


def _can_defer(x: Tensor, weight: nn.Parameter) -> bool:
    """Return whether backward reaches the layer through `x` alone, and the weight is trained."""
    return x.requires_grad and weight.requires_grad


# Deferring is a side effect, which a graph of torch.compile cannot hold.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_graph(function: type[Function], *args: Any) -> Tensor:
    return function.apply(*args)


class _ColumnParallelLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Group,
        sequence_parallel: bool,
        deferral: _Deferral | None,
        fp8: Fp8 | None,
    ) -> Tensor:
        # Only this rank's part of x is saved; backward gathers it again. That is the memory sequence parallelism saves.
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel, ctx.deferral, ctx.fp8 = group, sequence_parallel, deferral, fp8
        return linear(group.all_gather(x) if sequence_parallel else x, weight, bias, fp8)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        group, sequence_parallel = ctx.group, ctx.sequence_parallel
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if ctx.fp8 is not None:
            ctx.fp8.record(grad, "gradient")
        # torch.compile orders collectives itself, and traces only synchronous ones.
        overlap = not torch.compiler.is_compiling()
        gathered, gathering, gather = x, None, None
        if sequence_parallel and not needs_weight and ctx.deferral is not None and not ctx.deferral[0].immediate:
            gather = group  # when the gradient is computed
        elif sequence_parallel and (needs_weight or ctx.deferral is not None):
            x = x.contiguous()
            gathered = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
            gathering = group.all_gather_(gathered, x, async_op=overlap)
        grad_x = input_gradient(grad, weight, ctx.fp8) if needs_x else None
        _wait(gathering)
        reducing = None
        if grad_x is not None and sequence_parallel:
            unreduced, grad_x = grad_x, torch.empty_like(x)
            reducing = group.reduce_scatter_(grad_x, unreduced, async_op=overlap)
        elif grad_x is not None:
            reducing = group.all_reduce_(grad_x, async_op=overlap)
        # These overlap with the reduction of grad_x.
        if ctx.deferral is not None:
            deferred, parameter = ctx.deferral
            deferred.defer(parameter, grad, gathered, gather, ctx.fp8)
        grad_weight = weight_gradient(grad, gathered, ctx.fp8) if needs_weight else None
        grad_bias = grad.sum(dim=(0, 1)) if needs_bias else None
        _wait(reducing)
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _RowParallelLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        group: Group,
        sequence_parallel: bool,
        deferral: _Deferral | None,
        fp8: Fp8 | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel, ctx.deferral, ctx.fp8 = group, sequence_parallel, deferral, fp8
        y = linear(x, weight, fp8=fp8)
        if sequence_parallel:
            return group.reduce_scatter(y)
        group.all_reduce_(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            grad = ctx.group.all_gather(grad)
        if ctx.fp8 is not None:
            ctx.fp8.record(grad, "gradient")
        grad_x = input_gradient(grad, weight, ctx.fp8) if ctx.needs_input_grad[0] else None
        if ctx.deferral is not None:
            deferred, parameter = ctx.deferral
            deferred.defer(parameter, grad, x, fp8=ctx.fp8)
        grad_weight = weight_gradient(grad, x, ctx.fp8) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None, None


class _ReduceFromGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        out = x.clone()
        group.all_reduce_(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grad), None


def _wait(work: Work | None) -> None:
    if work is not None:
        work.wait()
