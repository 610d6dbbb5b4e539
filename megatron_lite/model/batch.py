"""What one forward and backward of the model reads: b samples of s tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_lite.model.documents import Documents


@dataclass(eq=False)
class MicroBatch:
    """b samples of s tokens, and where in the run they come."""

    tokens: Tensor
    """[b, s] int64."""
    labels: Tensor
    """[b, s] int64: the token after each token."""
    loss_mask: Tensor | None = None
    """[b, s] float32: weight of each token's loss; None: all 1."""
    position_ids: Tensor | None = None
    """[b, s] int64; None: 0, 1, 2, …"""
    document_ids: Tensor | None = None
    """[b, s] int64: tokens attend within their document only; None: to the whole sample."""
    documents: Documents | None = None
    """The same in a form that spares attention a mask; None: not known, or there is nothing to keep apart."""
    number: int = 0
    """The micro-batch's number in the global batch."""
    sources: tuple[int, ...] | None = None
    """Number of the data source of each sample; None where there is only one."""
