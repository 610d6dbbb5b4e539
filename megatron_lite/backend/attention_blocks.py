"""Block attention kernels for context parallelism: attention to a part of the keys with its log-sum-exp, and gradients.

Softmax over all keys is the merge of softmaxes over parts of them by their log-sum-exp (Dao et al. 2022,
arXiv:2205.14135, section 3.1). The gradient of a part needs the output and the log-sum-exp over all keys only.

Letters: s queries, t keys, b micro-batch, n query heads, g key/value heads (g divides n), d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return softmax(q kᵀ / √d + mask) v and the log-sum-exp of the scores, by separate products in fp32.

    Args:
        q: [s, b, n, d].
        k: [t, b, g, d].
        v: as k.
        mask: added to the scores, broadcast to [b, n, s, t]; -inf hides a key. None: no mask.
        causal: the last query attends to all keys, the one before to all but the last, and so on.
        keep: dropout's factors of the weights, [b, n, s, t]; None: no dropout.

    Returns:
        [s, b, n, d], zero for a query that attends to no key, and [b, n, s], -inf for it; both fp32.
    """
    scores = _scores(q, k, mask, causal)
    lse = scores.logsumexp(-1)
    weights = _weights(scores, lse)
    if keep is not None:
        weights = weights * keep
    out = weights.unflatten(1, (v.shape[2], -1)) @ _heads(v)
    return _merged(out.flatten(1, 2)), lse


def block_gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v of a block, fp32.

    Args:
        gradient: of the output over all keys, [s, b, n, d].
        q: [s, b, n, d].
        k: [t, b, g, d].
        v: as k.
        out: output over all keys, [s, b, n, d].
        lse: log-sum-exp over all keys, [b, n, s].
        mask: as for attend_block.
        causal: as for attend_block.
        keep: the factors of attend_block.
    """
    groups = k.shape[2]
    queries, keys, values = _grouped(q, groups), _heads(k), _heads(v)
    upstream = _grouped(gradient, groups)
    weights = _weights(_scores(q, k, mask, causal), lse)
    of_weights = (upstream @ values.transpose(-1, -2)).flatten(1, 2)
    kept = weights
    if keep is not None:
        kept, of_weights = weights * keep, of_weights * keep
    # The sum over all keys of weight * gradient of weight (Dao et al. 2022, appendix B.2).
    delta = (upstream * _grouped(out, groups)).sum(-1).flatten(1, 2)
    of_scores = weights * (of_weights - delta.unsqueeze(-1)) * q.shape[-1] ** -0.5
    of_scores = of_scores.unflatten(1, (groups, -1))
    of_q = of_scores @ keys
    of_k = (of_scores.transpose(-1, -2) @ queries).sum(2)
    of_v = (kept.unflatten(1, (groups, -1)).transpose(-1, -2) @ upstream).sum(2)
    return _merged(of_q.flatten(1, 2)), _merged(of_k), _merged(of_v)


Seeds = tuple[Tensor, Tensor]
"""Seed and offset of FlashAttention's dropout: not read without dropout, but required, of a device's own dtype."""


def flash_attend_block(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, Seeds]:
    """Return attend_block's results by torch's FlashAttention, the output in the dtype of `q`; and its seeds."""
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
    results = flash(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), 0.0, causal)
    return results[0].permute(2, 0, 1, 3), results[1], (results[6], results[7])


def flash_block_gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, seeds: Seeds
) -> tuple[Tensor, Tensor, Tensor]:
    """Return block_gradients' results by torch's FlashAttention, in the dtype of `q`; with the seeds of a forward."""
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward
    inputs = [x.permute(1, 2, 0, 3) for x in (gradient, q, k, v, out)]
    # Lengths of documents (None) are of the varlen kernel.
    gradients = flash(*inputs, lse.contiguous(), None, None, q.shape[0], k.shape[0], 0.0, causal, *seeds)
    of_q, of_k, of_v = (x.permute(2, 0, 1, 3) for x in gradients[:3])
    return of_q, of_k, of_v


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return q kᵀ / √d + mask, [b, n, s, t] fp32."""
    products = _grouped(q, k.shape[2]) @ _heads(k).transpose(-1, -2)
    scores = products.flatten(1, 2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[0] - q.shape[0])
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Return exp(scores - lse); zero where both are -inf, of a query that attends to no key of the block."""
    return (scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()


def _heads(x: Tensor) -> Tensor:
    """`x` [t, b, g, d] -> [b, g, 1, t, d] fp32."""
    return x.permute(1, 2, 0, 3).float().unsqueeze(2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """`x` [s, b, n, d] -> [b, g, n/g, s, d] fp32."""
    return x.permute(1, 2, 0, 3).float().unflatten(1, (groups, -1))


def _merged(x: Tensor) -> Tensor:
    """`x` [b, n, s, d] -> [s, b, n, d]."""
    return x.permute(2, 0, 1, 3)
