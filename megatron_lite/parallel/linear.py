"""A matrix product whose weight is split over the tp axis, with its collectives under way while gradients are computed.

Letters: s sequence, b micro-batch, i and o input and output channels, tp the group's size.
On a group of one rank these are F.linear and nothing else, unless weight gradients are computed later (zero bubble).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

from megatron_lite.backend.group import Group, Work
from megatron_lite.parallel.weight_gradients import WeightGradients

PutOff = Callable[..., None]
"""WeightGradients.put_off for one weight: takes the output's gradient, the input, and the group that splits it."""


def column_parallel_linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool,
    later: WeightGradients | None = None,
) -> Tensor:
    """The product x Wᵀ + b where each rank holds some rows of W (output channels).

    Args:
        x: [s, b, i], the same on every rank; under sequence parallelism this rank's [s/tp, b, i].
        weight: [o/tp, i].
        bias: [o/tp] or None.
        group: the tp group.
        sequence_parallel: whether x must be gathered along the sequence first.
        later: where backward leaves the weight's gradient; None: it computes it itself.

    Returns:
        [s, b, o/tp].
    """
    if later is not None:
        # Autograd is not to know of the weight: it would report a gradient that has not come yet.
        put_off = partial(later.put_off, weight)
        return _without_graph(_ColumnParallelLinear, x, weight.detach(), bias, group, sequence_parallel, put_off)
    if group.size == 1:
        return F.linear(x, weight, bias)
    return _ColumnParallelLinear.apply(x, weight, bias, group, sequence_parallel, None)


def row_parallel_linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool,
    later: WeightGradients | None = None,
) -> Tensor:
    """The product x Wᵀ + b where each rank holds some columns of W (input channels), and so one term of the sum.

    Args:
        x: [s, b, i/tp].
        weight: [o, i/tp].
        bias: [o] or None, the same on every rank; added once, after the sum.
        group: as in column_parallel_linear, like `later`.
        sequence_parallel: whether each rank keeps only its part of the sequence.
        later: see there.

    Returns:
        [s, b, o], the same on every rank; under sequence parallelism [s/tp, b, o].
    """
    if group.size == 1 and later is None:
        return F.linear(x, weight, bias)
    if later is not None:
        put_off = partial(later.put_off, weight)
        y = _without_graph(_RowParallelLinear, x, weight.detach(), group, sequence_parallel, put_off)
    else:
        y = _RowParallelLinear.apply(x, weight, group, sequence_parallel, None)
    return y if bias is None else y + bias


# What a backward puts off lies outside of any graph that torch.compile makes.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _without_graph(function: type[Function], *args: Any) -> Tensor:
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
        put_off: PutOff | None,
    ) -> Tensor:
        # Only this rank's part of x is kept; backward gathers it again. That is what sequence parallelism saves.
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel, ctx.put_off = group, sequence_parallel, put_off
        return F.linear(group.all_gather(x) if sequence_parallel else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        group, sequence_parallel = ctx.group, ctx.sequence_parallel
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        overlap = _may_overlap()
        if ctx.put_off is not None:
            ctx.put_off(grad, x, group if sequence_parallel else None)
        gathered, gathering = x, None
        if sequence_parallel and needs_weight:
            x = x.contiguous()
            gathered = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
            gathering = group.all_gather_(gathered, x, async_op=overlap)
        grad_x = torch.matmul(grad, weight) if needs_x else None
        _wait(gathering)
        reducing = None
        if grad_x is not None and sequence_parallel:
            whole, grad_x = grad_x, torch.empty_like(x)
            reducing = group.reduce_scatter_(grad_x, whole, async_op=overlap)
        elif grad_x is not None:
            reducing = group.all_reduce_(grad_x, async_op=overlap)
        # The network works on grad_x while the device works on these.
        grad_weight = _weight_gradient(grad, gathered) if needs_weight else None
        grad_bias = grad.sum(dim=(0, 1)) if needs_bias else None
        _wait(reducing)
        return grad_x, grad_weight, grad_bias, None, None, None


class _RowParallelLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group: Group, sequence_parallel: bool, put_off: PutOff | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel, ctx.put_off = group, sequence_parallel, put_off
        y = F.linear(x, weight)
        if sequence_parallel:
            return group.reduce_scatter(y)
        group.all_reduce_(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            grad = ctx.group.all_gather(grad)
        grad_x = torch.matmul(grad, weight) if ctx.needs_input_grad[0] else None
        if ctx.put_off is not None:
            ctx.put_off(grad, x)
        grad_weight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x: grad [s, b, o], x [s, b, i] -> [o, i]."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _may_overlap() -> bool:
    # torch.compile orders collectives itself, and traces only those that it need not wait for.
    return not torch.compiler.is_compiling()


def _wait(work: Work | None) -> None:
    if work is not None:
        work.wait()
