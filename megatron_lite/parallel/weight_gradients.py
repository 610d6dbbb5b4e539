"""Weight gradients put off: zero-bubble schedules compute a stage's input gradient now and its weight gradients later.

Splitting a linear layer's backward is Qi et al.'s (2023, arXiv:2401.10241). Only matrix products are put off; norms,
biases and embeddings, whose gradients cost little, are done at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_lite.backend.group import Group

Accumulate = Callable[[nn.Parameter, Tensor], None]
"""Adds a gradient to its parameter's buffer (ParameterBuffers.accumulate)."""
Key = tuple[int, int]


class _Product(NamedTuple):
    """What is left to do for one weight: gradientᵀ x."""

    weight: nn.Parameter
    gradient: Tensor
    x: Tensor
    gather: Group | None


class WeightGradients:
    """Holds the products that backward put off, by (stage, micro-batch), until they are asked for."""

    def __init__(self) -> None:
        self._waiting: dict[Key, deque[_Product]] = {}
        self._open: deque[_Product] | None = None

    @contextmanager
    def deferred(self, key: Key) -> Iterator[None]:
        """Within it, backward's weight gradients are kept under `key` instead of being computed."""
        self._open = self._waiting.setdefault(key, deque())
        try:
            yield
        finally:
            self._open = None

    def put_off(self, weight: nn.Parameter, gradient: Tensor, x: Tensor, gather: Group | None = None) -> None:
        """Keeps a product for later.

        Args:
            weight: [o, i].
            gradient: [..., o], of the layer's output.
            x: [..., i], the layer's input.
            gather: x is this rank's part of the sequence: it is gathered over this group when the product is computed.
        """
        assert self._open is not None, "a stage that splits its backward runs it within deferred()"
        self._open.append(_Product(weight, gradient, x, gather))

    @torch.no_grad()
    def compute(self, key: Key, accumulate: Accumulate) -> None:
        """Computes what was put off under `key`, in the order of backward, and hands each gradient over."""
        products = self._waiting.pop(key)
        while products:
            weight, gradient, x, gather = products.popleft()
            if gather is not None:
                x = gather.all_gather(x)
            accumulate(weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2))
