"""Attention by matrix products and softmax, for devices on which torch's attention kernel cannot be used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, causal: bool) -> Tensor:
    """Return attention by products that keep batch and heads as dims; shapes as in Backend.attention."""
    if q.shape[2] != k.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q * q.shape[-1] ** -0.5, k).float()
    if causal:
        queries, keys = (torch.arange(length, device=q.device) for length in (q.shape[0], k.shape[0]))
        scores = scores.masked_fill(keys > queries.unsqueeze(1), float("-inf"))
    if mask is not None:
        scores = scores + mask
    shares = F.dropout(scores.softmax(-1), dropout)
    return torch.einsum("bnst,tbnd->sbnd", shares.to(v.dtype), v)
