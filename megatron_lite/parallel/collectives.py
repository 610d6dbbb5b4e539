"""Collectives as autograd pairs: each forward names the collective that its backward does.

They are Megatron's f and g (Shoeybi et al. 2019, arXiv:1909.08053, fig. 3) and their sequence-parallel versions
(Korthikanti et al. 2022, arXiv:2205.05198, fig. 5). All are identities on a group of one rank, and plain enough for
torch.compile to trace. Sequence collectives run along dim 0, where [s, b, h] is cut without a copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function

from megatron_lite.backend.group import Group


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """f: the same `x` for every rank; backward sums the gradients over the group."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """g: the sum of every rank's `x`; backward hands the gradient on as it is."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[s/tp, ...] -> [s, ...] by all-gather; backward reduce-scatters."""
    return x if group.size == 1 else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's x [s, ...], of which each keeps [s/tp, ...]; backward all-gathers."""
    return x if group.size == 1 else _ReduceScatterSequence.apply(x, group)


def local_slice(x: Tensor, group: Group) -> Tensor:
    """This rank's [s/tp, ...] of x [s, ...]: a view. Its gradient is zero elsewhere, so it adds up over the group."""
    if group.size == 1:
        return x
    length = x.shape[0] // group.size
    return x.narrow(0, group.rank * length, length)


class _CopyToGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()  # autograd may hand the same gradient to someone else
        ctx.group.all_reduce_(grad)
        return grad, None


class _ReduceFromGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        out = x.clone()
        group.all_reduce_(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grad), None


class _ReduceScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grad), None
