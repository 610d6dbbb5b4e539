"""Weight gradients put off: zero-bubble schedules compute a stage's input gradient now and its weight gradients later.

Splitting a linear layer's backward is Qi et al.'s (2023, arXiv:2401.10241). Only matrix products are put off; norms,
biases and embeddings, whose gradients cost little, are done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F

Accumulate = Callable[[nn.Parameter, Tensor], None]
Key = tuple[int, int]


class WeightGradients:
    """Holds the products that backward put off, by (stage, micro-batch), until they are asked for.

    Args:
        accumulate: adds a gradient to its parameter's buffer (ParameterBuffers.accumulate).
    """

    def __init__(self, accumulate: Accumulate) -> None:
        self._accumulate = accumulate
        self._waiting: dict[Key, list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        self._open: list[tuple[nn.Parameter, Tensor, Tensor]] | None = None

    @contextmanager
    def deferred(self, key: Key) -> Iterator[None]:
        """Within it, backward's weight gradients are kept under `key` instead of being computed."""
        self._open = self._waiting.setdefault(key, [])
        try:
            yield
        finally:
            self._open = None

    def put_off(self, weight: nn.Parameter, gradient: Tensor, x: Tensor) -> bool:
        """Keeps gradientᵀ x for later: gradient [..., o], x [..., i]. False: nothing is being deferred now."""
        if self._open is None:
            return False
        self._open.append((weight, gradient, x))
        return True

    @torch.no_grad()
    def compute(self, key: Key) -> None:
        """Computes what was put off under `key` and adds it to the parameters' gradients."""
        for weight, gradient, x in self._waiting.pop(key):
            self._accumulate(weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2))
