"""Micro-batch: tokens, labels and masks of b samples, and the documents within them for document-masked attention.

A rank has the parts that its pipeline stages read.

Letters: s sequence, b micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents within a micro-batch: their places for a varlen kernel, and groups of equal length for other kernels.

    Documents of equal length, of whichever sample, are one call of attention. There are fewer calls than √(2 b s),
    the number of different lengths that can add up to b s; padding, of one-token documents, is one call. A varlen
    kernel takes all documents in one call. The tensors are computed on the host (data/serving/masks.py), so that the
    device is not waited for.
    """

    order: Tensor
    """[b s] int64: the tokens document by document, in the order of `groups`. Token i of sample j is i b + j."""
    inverse: Tensor
    """[b s] int64: the inverse permutation, each token's place in `order`."""
    groups: tuple[tuple[int, int], ...]
    """For each document length: (number of documents, length)."""
    cu_seqlens: Tensor
    """[documents + 1] int32: the first token of each document among the b s tokens sample by sample, then b s."""

    def to(self, move: Callable[[Tensor], Tensor]) -> Documents:
        """Return the same documents with each tensor moved."""
        order, inverse, cu_seqlens = (move(x) for x in (self.order, self.inverse, self.cu_seqlens))
        return replace(self, order=order, inverse=inverse, cu_seqlens=cu_seqlens)

    def split(self, x: Tensor) -> list[Tensor]:
        """`x` [s, b, ...] -> for each group [length, number of documents, ...]."""
        ordered = _permute(x.flatten(0, 1), self.order, self.inverse)
        parts = ordered.split([count * length for count, length in self.groups])
        return [part.unflatten(0, group).transpose(0, 1) for part, group in zip(parts, self.groups, strict=True)]

    def merge(self, parts: Sequence[Tensor], length: int) -> Tensor:
        """Undo split: parts [length, number of documents, ...] -> [s, b, ...], where s = `length`."""
        ordered = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in parts])
        return _permute(ordered, self.inverse, self.order).unflatten(0, (length, -1))


@dataclass(eq=False)
class MicroBatch:
    """Input of one forward and backward pass: b samples of s tokens."""

    tokens: Tensor | None = None
    """[b, s] int64, for the first stage; None: no stage of this rank reads them."""
    labels: Tensor | None = None
    """[b, s] int64: the token after each token, for the last stage; None: no stage of this rank reads them."""
    loss_mask: Tensor | None = None
    """[b, s] float32: weight of each token's loss; None: all 1."""
    position_ids: Tensor | None = None
    """[b, s] int64; None: 0, 1, 2, ..."""
    documents: Documents | None = None
    """Documents that attention is restricted to; None: each sample is one document."""
    number: int = 0
    """Number of the micro-batch in the global batch."""
    sources: tuple[int, ...] | None = None
    """Number of the data source of each sample; None: there is only one, or the loss is another rank's."""
    shape: tuple[int, int] = (0, 0)
    """(b, s); follows from the tokens or labels if the rank has them."""

    def __post_init__(self) -> None:
        given = self.labels if self.tokens is None else self.tokens
        if given is not None:
            self.shape = (given.shape[0], given.shape[1])

    def to(self, move: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Return the same micro-batch with each tensor moved."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else move(x)

        return replace(
            self,
            tokens=moved(self.tokens),
            labels=moved(self.labels),
            loss_mask=moved(self.loss_mask),
            position_ids=moved(self.position_ids),
            documents=None if self.documents is None else self.documents.to(move),
        )


class _Permute(torch.autograd.Function):
    """Permutation of rows. Its gradient is the inverse permutation; that of index_select would add up rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    out: Tensor = _Permute.apply(x, order, inverse)
    return out
