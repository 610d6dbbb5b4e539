"""Matrix products (GEMM) of linear layers: forward, input gradient, weight gradient, deferred weight gradients.

Every large product of the model goes through this module, in the dtype of its operands or in fp8 (parallel/fp8.py). On
an XLA device products keep the dims of their operands: in [s b, h], samples that are split over the mesh would be
gathered.

Letters: i input channels, o output channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.backend.group import Group
from megatron_lite.backend.vendors import WeightGradientKernel
from megatron_lite.config.runtime import GRADIENT_ROWS
from megatron_lite.parallel.fp8 import Fp8

Key = tuple[int, int]
"""(stage, micro-batch)."""


class Accumulate(Protocol):
    """Adds the weight gradient gradientᵀ x to the weight's buffer (ParameterBuffers.accumulate_product)."""

    def __call__(
        self, weight: nn.Parameter, gradient: Tensor, x: Tensor, /, *, last: bool = True, fp8: Fp8 | None = None
    ) -> None:
        """Add the product; `last`: no other product of this micro-batch follows for the weight."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, fp8: Fp8 | None = None) -> Tensor:
    """Return x Wᵀ + b: `x` [..., i], `weight` [o, i], `bias` [o] -> [..., o].

    Called outside of an autograd function, without fp8, torch computes the gradients with products of its own.
    """
    if x.device.type == "xla":
        y = torch.einsum("...i,oi->...o", x, weight)
        return y if bias is None else y + bias
    if fp8 is None:
        return F.linear(x, weight, bias)
    fp8.record(x, "input")
    fp8.record(weight, "weight")
    y = fp8.product(x.flatten(0, -2), weight, ("input", "weight")).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def input_gradient(gradient: Tensor, weight: Tensor, fp8: Fp8 | None = None) -> Tensor:
    """Return gradient W: `gradient` [..., o], `weight` [o, i] -> [..., i]."""
    if gradient.device.type == "xla":
        return torch.einsum("...o,oi->...i", gradient, weight)
    if fp8 is None:
        return torch.matmul(gradient, weight)
    product = fp8.product(gradient.flatten(0, -2), weight.t(), ("gradient", "weight"))
    return product.unflatten(0, gradient.shape[:-1])


def weight_gradient(gradient: Tensor, x: Tensor, fp8: Fp8 | None = None) -> Tensor:
    """Return gradientᵀ x: `gradient` [..., o], `x` [..., i] -> [o, i], summed over the leading dims."""
    if x.device.type == "xla":
        return torch.einsum("...o,...i->oi", gradient, x)
    gradient, x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return gradient.t() @ x if fp8 is None else fp8.product(gradient.t(), x.t(), ("gradient", "input"))


def accumulate_weight_gradient_(
    out: Tensor,
    gradient: Tensor,
    x: Tensor,
    *,
    first: bool,
    fp8: Fp8 | None = None,
    fused: WeightGradientKernel | None = None,
) -> None:
    """Add gradientᵀ x to `out`.

    In fp32, or with a fused kernel, the product accumulates into `out` itself. Otherwise it is a temporary tensor in
    the dtype of `x`, of a bounded number of rows at a time.

    Args:
        out: [o, i] fp32.
        gradient: [..., o], of the product's output.
        x: [..., i], the product's input.
        first: overwrite `out`, whose values are of an earlier iteration.
        fp8: formats of the product; None: the dtype of `x`.
        fused: accumulates products of half-precision operands; None: there is none.
    """
    gradient, x = gradient.flatten(0, -2), x.flatten(0, -2)
    if x.dtype == out.dtype:
        torch.addmm(out, gradient.t(), x, beta=0 if first else 1, out=out)
        return
    if fused is not None and fp8 is None:
        fused(out, gradient, x, first)
        return
    for rows, part in zip(out.split(GRADIENT_ROWS), gradient.split(GRADIENT_ROWS, dim=-1), strict=True):
        product = weight_gradient(part, x, fp8)
        rows.copy_(product) if first else rows.add_(product)


class _Product(NamedTuple):
    """Operands of a deferred weight gradient."""

    weight: nn.Parameter
    gradient: Tensor
    x: Tensor
    gather: Group | None
    fp8: Fp8 | None


class DeferredWeightGradients:
    """Operands of weight gradients that backward deferred, by (stage, micro-batch).

    Zero-bubble schedules (Qi et al. 2023, arXiv:2401.10241) split the backward of a linear layer: the input gradient is
    computed at once, the weight gradient later, where the pipeline would idle. Only matrix products are deferred;
    gradients of norms, biases and embeddings cost little and are computed at once.
    """

    immediate = False

    def __init__(self) -> None:
        self._products: dict[Key, deque[_Product]] = {}
        self._open: deque[_Product] | None = None

    @contextmanager
    def collect(self, key: Key) -> Iterator[None]:
        """Store the weight gradients of a backward pass that runs inside of this context under `key`."""
        self._open = self._products.setdefault(key, deque())
        try:
            yield
        finally:
            self._open = None

    def defer(
        self,
        weight: nn.Parameter,
        gradient: Tensor,
        x: Tensor,
        gather: Group | None = None,
        fp8: Fp8 | None = None,
    ) -> None:
        """Store the operands of one weight gradient.

        Args:
            weight: [o, i].
            gradient: [..., o], of the layer's output.
            x: [..., i], the layer's input.
            gather: group that splits the sequence: `x` is all-gathered over it when the product is computed; None: `x`
                has the whole sequence.
            fp8: formats of the product; None: the dtype of `x`.
        """
        assert self._open is not None, "backward of a stage with deferred weight gradients must run inside collect()"
        # With its graph, the operand would keep the stage's input in memory.
        self._open.append(_Product(weight, gradient, x.detach(), gather, fp8))

    @torch.no_grad()
    def compute(self, key: Key, accumulate: Accumulate) -> None:
        """Compute the weight gradients stored under `key`, in the order of backward, and accumulate each."""
        products = self._products.pop(key)
        while products:
            weight, gradient, x, gather, fp8 = products.popleft()
            accumulate(weight, gradient, x if gather is None else gather.all_gather(x), fp8=fp8)


class FusedWeightGradients:
    """Accumulates weight gradients where backward computes them, instead of handing them to autograd.

    The gradient of a half-precision weight is then never a tensor of its own (Megatron's gradient accumulation fusion).

    Attributes:
        accumulate: set once the buffers exist.
    """

    immediate = True

    def __init__(self) -> None:
        self.accumulate: Accumulate | None = None

    def defer(
        self,
        weight: nn.Parameter,
        gradient: Tensor,
        x: Tensor,
        gather: Group | None = None,
        fp8: Fp8 | None = None,
    ) -> None:
        """Accumulate one weight gradient; arguments as for DeferredWeightGradients, and `x` has been gathered."""
        assert self.accumulate is not None and gather is None
        self.accumulate(weight, gradient, x, fp8=fp8)


WeightGradients = DeferredWeightGradients | FusedWeightGradients
"""Takes the weight gradients of linear layers in backward, in place of autograd."""
