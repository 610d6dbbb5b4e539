"""Context-parallel causal attention: a rank's queries attend to the keys of all ranks that share the sequence.

Attention to one block of keys at a time; the results are merged by their log-sum-exp. Only queries, keys and values of
this rank, the output and the log-sum-exp are kept for backward, which exchanges keys and values again.

Letters: s whole sequence, l = s/cp the part of a rank, t keys of a block, r queries of a block, b micro-batch, n query
heads and g key/value heads of this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from megatron_lite.backend.attention_blocks import (
    attend_block,
    block_gradients,
    flash_attend_block,
    flash_block_gradients,
)
from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.config.runtime import MAX_SCORES
from megatron_lite.model.batch import Documents
from megatron_lite.parallel.context_parallel import Block, KeyExchange, chunk_positions


@dataclass(frozen=True, eq=False)
class ContextAttention:
    """Attention within one micro-batch.

    Attributes:
        group: the context-parallel group.
        exchange: of keys and values over it.
        backend: has the kernel of a block without mask and dropout, or none.
        length: s.
        slopes: ALiBi's slope of each head, [n] fp32; None: no ALiBi.
        starts: position of the first token of each token's document, [b, s]; None: each sample is one document.
    """

    group: Group
    exchange: KeyExchange
    backend: Backend
    length: int
    slopes: Tensor | None = None
    starts: Tensor | None = None

    # Its collectives and the seed of dropout are side effects, which a graph of torch.compile cannot hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, seed: Callable[[], None]) -> Tensor:
        """Return causal attention: q [l, b, n, d], k and v [l, b, g, d] -> [l, b, n d].

        Args:
            q: queries of this rank.
            k: keys of this rank.
            v: values of this rank.
            dropout: rate of the attention weights.
            seed: seeds the device's generator, from which the masks of dropout are drawn, in forward and in backward.
        """
        out: Tensor = _ContextAttention.apply(q, k, v, self, dropout, seed)
        return out.flatten(2, 3)

    def has_kernel(self, q: Tensor, dropout: float) -> bool:
        """Return whether the backend's kernel computes the blocks; otherwise separate products do."""
        return self.slopes is None and self.starts is None and not dropout and self.backend.has_block_kernel(q)

    def divided(self, block: Block, q: Tensor) -> Iterator[Block]:
        """Yield a block in parts of its queries, [l, b, n, d] in all, each with the keys that it attends to."""
        start, stop, _ = block.rows.indices(q.shape[0])
        step = max(1, MAX_SCORES // (q.shape[1] * q.shape[2] * block.kv.shape[1]))
        for first in range(start, stop, step):
            end = min(first + step, stop)
            yield replace(block, rows=slice(first, end), kv=block.kv[:, :end] if block.causal else block.kv)

    def mask(self, block: Block) -> Tensor | None:
        """Return what is added to the scores of a block, [b or 1, n or 1, r, t] fp32; None: nothing."""
        if self.slopes is None and self.starts is None:
            return None
        size, device = self.group.size, block.kv.device
        queries = chunk_positions(self.group.rank, self.length, size, device)[block.rows]
        of_rank = block.chunks * self.length // (2 * size)
        keys = torch.cat([chunk_positions(rank, self.length, size, device)[:of_rank] for rank in block.sources])
        keys = keys[: block.kv.shape[1]]
        if self.slopes is None:
            mask = torch.zeros(1, 1, len(queries), len(keys), device=device)
        else:
            mask = self.slopes.view(1, -1, 1, 1) * (keys - queries.unsqueeze(1))
        if self.starts is None:
            return mask
        hidden = keys < self.starts[:, queries].unsqueeze(-1)
        return mask.masked_fill(hidden.unsqueeze(1), float("-inf"))


class _ContextAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: ContextAttention,
        dropout: float,
        seed: Callable[[], None],
    ) -> Tensor:
        # Copies: views would keep the whole output of the qkv projection in memory until backward.
        q, kv = q.contiguous(), torch.stack((k, v))
        fused = context.has_kernel(q, dropout)
        dtype = torch.promote_types(q.dtype, torch.float32)
        length, batch, heads, _ = q.shape
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse = torch.empty(batch, heads, length, dtype=dtype, device=q.device)
        if dropout:
            seed()
        for block in context.exchange.blocks(kv):
            for part in [block] if fused else context.divided(block, q):
                rows, queries, (keys, values) = part.rows, q[part.rows], part.kv
                if fused:
                    partial, partial_lse, ctx.seeds = flash_attend_block(queries, keys, values, part.causal)
                else:
                    keep = _keep(queries, keys, dropout)
                    partial, partial_lse = attend_block(
                        queries, keys, values, mask=context.mask(part), causal=part.causal, keep=keep
                    )
                if part.causal:  # the first block, in which every query attends to a key: its log-sum-exp is finite
                    out[rows], lse[..., rows] = partial, partial_lse
                else:
                    _merge_(out[rows], lse[..., rows], partial, partial_lse)
        ctx.context, ctx.dropout, ctx.seed, ctx.fused = context, dropout, seed, fused
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        context, dropout = ctx.context, ctx.dropout
        of_q = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))

        def of_blocks() -> Iterator[tuple[Block, Tensor]]:
            for block in context.exchange.blocks(kv):
                of_kv: Tensor | None = None
                for part in [block] if ctx.fused else context.divided(block, q):
                    rows, (keys, values) = part.rows, part.kv
                    inputs = (gradient[rows], q[rows], keys, values, out[rows], lse[..., rows])
                    if ctx.fused:
                        gradients = flash_block_gradients(*inputs, part.causal, ctx.seeds)
                    else:
                        keep = _keep(q[rows], keys, dropout)
                        gradients = block_gradients(*inputs, mask=context.mask(part), causal=part.causal, keep=keep)
                    of_q[rows] += gradients[0]
                    own = torch.stack(gradients[1:])
                    if of_kv is not None:  # of the queries before, which attend to as many keys or fewer
                        own[:, : of_kv.shape[1]] += of_kv
                    of_kv = own
                assert of_kv is not None, "a block has queries"
                yield block, of_kv

        if dropout:
            ctx.seed()
        of_kv = context.exchange.sum_gradients(kv, of_blocks())
        return of_q.to(q.dtype), of_kv[0], of_kv[1], None, None, None


def document_starts(documents: Documents, batch_size: int) -> Tensor:
    """Return the position of the first token of each token's document, [b, s] int64."""
    tokens = documents.order.numel()
    begins = documents.cu_seqlens[:-1].long()
    # With its size given, the device is not waited for.
    starts = begins.repeat_interleave(documents.cu_seqlens.diff(), output_size=tokens)
    return (starts % (tokens // batch_size)).view(batch_size, -1)


def _keep(q: Tensor, k: Tensor, dropout: float) -> Tensor | None:
    """Draw dropout's factors of the weights of a block, [b, n, r, t]; None: no dropout."""
    if not dropout:
        return None
    length, batch, heads, _ = q.shape
    kept = torch.empty(batch, heads, length, k.shape[0], device=q.device).bernoulli_(1.0 - dropout)
    return kept.div_(1.0 - dropout)


def _merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a block's output [r, b, n, d] and log-sum-exp [b, n, r] into those of the blocks before, in place."""
    total = torch.logaddexp(lse, part_lse)
    old, new = ((x - total).exp().permute(2, 0, 1).unsqueeze(-1) for x in (lse, part_lse))
    out.mul_(old).add_(part * new)
    lse.copy_(total)
