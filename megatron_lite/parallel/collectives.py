"""Collectives as autograd pairs: each forward names the collective that its backward does.

Megatron's g (Shoeybi et al. 2019, arXiv:1909.08053, fig. 3) and its sequence-parallel version (Korthikanti et al. 2022,
arXiv:2205.05198, fig. 5), for what is no matrix product; f and its like are inside linear.py, where they overlap with
the weight's gradient. All are identities on a group of one rank, and plain enough for torch.compile to trace. Sequence
collectives run along dim 0, where [s, b, h] is cut without a copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import Function

from megatron_lite.backend.group import Group


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """g: the sum of every rank's `x`; backward hands the gradient on as it is."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """The sum of every rank's x [s, ...], of which each keeps [s/tp, ...]; backward all-gathers."""
    return x if group.size == 1 else _ReduceScatterSequence.apply(x, group)


def local_slice(x: Tensor, group: Group) -> Tensor:
    """This rank's [s/tp, ...] of x [s, ...]: a view. Its gradient is zero elsewhere, so it adds up over the group."""
    if group.size == 1:
        return x
    length = x.shape[0] // group.size
    return x.narrow(0, group.rank * length, length)


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
