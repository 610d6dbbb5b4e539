"""The documents within the samples of a micro-batch: taken apart for attention, and put together again.

Letters: s sequence, b micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of b samples of s tokens lie: found on the host (data/masks.py), so that no device waits.

    Documents of one length, whichever samples they are in, are one call of attention. So there are fewer calls than
    √(2 b s), the most lengths that differ and add up to b s, and padding of one-token documents is one of them.
    """

    rows: Tensor
    """[b s] int64: the tokens, document after document, in the order of groups. Token i of sample j is i b + j."""
    places: Tensor
    """[b s] int64: the inverse, where in `rows` each token is."""
    groups: tuple[tuple[int, int], ...]
    """Of each length that documents have: (how many there are, the length)."""

    def apart(self, x: Tensor) -> list[Tensor]:
        """`x` [s, b, …] -> for each group [its length, how many, …]."""
        ordered = _reordered(x.flatten(0, 1), self.rows, self.places)
        parts = ordered.split([count * length for count, length in self.groups])
        return [part.unflatten(0, group).transpose(0, 1) for part, group in zip(parts, self.groups, strict=True)]

    def together(self, parts: Sequence[Tensor], length: int) -> Tensor:
        """What became of the parts, each [its length, how many, …] -> [s, b, …], s being `length`."""
        ordered = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in parts])
        return _reordered(ordered, self.places, self.rows).unflatten(0, (length, -1))


class _Reordered(torch.autograd.Function):
    """Rows in another order. Only a permutation has a gradient that is one too, where torch's would add up rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def _reordered(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    out: Tensor = _Reordered.apply(x, order, inverse)
    return out
