"""Causal self-attention: multi-head or grouped-query, computed by the backend's kernel, and its KV cache.

Letters: s sequence (with context parallelism the part of a rank), b micro-batch, h hidden, n query heads and g
key/value heads of this rank, q = n/g, d channels of a head, t tokens in all (s, and those of a cache), tp size of the
tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.batch import Documents
from megatron_lite.model.context_attention import ContextAttention
from megatron_lite.model.norms import Norm
from megatron_lite.model.positions import RotaryTable
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear, Sharding
from megatron_lite.parallel.random import RngStreams, layer_number
from megatron_lite.parallel.recompute import recomputed


class KVCache:
    """Keys and values [T, b, g, d] of each layer of a stage, for generation; T is the maximum length.

    Each row has a length of its own, and the index of a token in its row is its position. A forward pass computes
    either the first tokens of some rows, which may be padded on the right, or the next token of every row. No query
    attends to padding: in the first tokens the mask is causal, and the next tokens overwrite the padding.

    Args:
        layers: numbers of the stage's layers in the whole model.
        shape: (T, b, g, d).
        dtype: of the model's parameters.
        device: of the model.
    """

    def __init__(
        self, layers: Iterable[int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._store = {layer: torch.zeros((2, *shape), dtype=dtype, device=device) for layer in layers}
        self._device = device
        self.max_length, self.num_rows = shape[:2]

    def first(self, rows: Sequence[int]) -> CachedPass:
        """Return the pass that computes the first tokens of rows, whose content it replaces."""
        return CachedPass(self._store, torch.tensor(rows, device=self._device))

    def next(self, positions: Sequence[int]) -> CachedPass:
        """Return the pass that computes one token of every row, at its position."""
        assert len(positions) == self.num_rows, (positions, self.num_rows)
        length = max(positions) + 1
        assert length <= self.max_length, f"{length} tokens exceed the cache's {self.max_length}"
        rows, at = (torch.tensor(x, device=self._device) for x in (range(self.num_rows), positions))
        return CachedPass(self._store, rows, at, length, aligned=min(positions) == length - 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; the rows that are left are numbered from 0."""
        index = torch.tensor(rows, device=self._device)
        self._store = {layer: stored.index_select(2, index) for layer, stored in self._store.items()}
        self.num_rows = len(rows)


@dataclass(frozen=True, eq=False)
class CachedPass:
    """Rows and positions of a KVCache that one forward pass writes and reads.

    Attributes:
        store: keys and values [2, T, b, g, d] by layer.
        rows: [b'] rows of the cache that the pass computes.
        positions: [b'] position of the single token of each row; None: the pass computes the first tokens.
        length: number of cached tokens, these included, of the longest row; unused for the first tokens.
        aligned: True if all rows have that length.
    """

    store: Mapping[int, Tensor]
    rows: Tensor
    positions: Tensor | None = None
    length: int = 0
    aligned: bool = True

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's key and value [s, b', g, d]; return those to attend to, [s or length, b', g, d]."""
        keys, values = self.store[layer]
        if self.positions is None:
            keys[: key.shape[0], self.rows] = key
            values[: key.shape[0], self.rows] = value
            return key, value
        keys[self.positions, self.rows] = key[0]
        values[self.positions, self.rows] = value[0]
        return keys[: self.length], values[: self.length]


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Inputs of attention that all layers of a stage share in one forward pass."""

    rotary: RotaryTable | None = None
    """None: the model has no rotary position embedding."""
    mask: Tensor | None = None
    """ALiBi's bias, or the mask of rows of a cache (positions.AttentionMask); None: causal."""
    slopes: Tensor | None = None
    """ALiBi's slope of each head of this rank, [n] fp32, for a kernel that computes the bias; None: no ALiBi."""
    documents: Documents | None = None
    """Documents that attention is restricted to; None: each sample is one document."""
    cache: CachedPass | None = None
    over_ranks: ContextAttention | None = None
    """Attention to the keys of all context-parallel ranks, which has masks of its own; None: this rank has all keys."""


class SelfAttention(nn.Module):
    """Causal self-attention with its qkv and output projections.

    Output channels of the qkv projection are in Megatron's order: for each of the g groups its q query heads, then its
    key, then its value. Split over tp, each rank has complete groups.

    Args:
        config: the model.
        layer: number of the layer in the whole model.
        sharding: of the stage.
        rng: dropout streams.
        recompute_core: recompute the attention, without the projections, in backward.
    """

    def __init__(
        self, config: ModelConfig, layer: int, sharding: Sharding, rng: RngStreams, recompute_core: bool
    ) -> None:
        super().__init__()
        assert config.num_query_groups % sharding.tp.size == 0, (config.num_query_groups, sharding.tp)
        self.layer = layer
        self.layer_number = layer_number(layer)
        self.rng = rng
        self.backend = sharding.backend
        self.split = sharding.tp.size > 1
        self.dropout = config.attention_dropout
        self.recompute_core = recompute_core
        self.kernel = sharding.kernels.attention
        self.head_dim = config.head_dim
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        width = config.num_attention_heads * config.head_dim
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            width + 2 * config.num_query_groups * config.head_dim,
            sharding,
            bias=config.qkv_bias,
        )
        self.proj = RowParallelLinear(width, config.hidden_size, sharding, bias=config.linear_bias)
        self.q_norm, self.k_norm = (_head_norm(config, sharding), _head_norm(config, sharding))

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h]; context parallel: s/cp instead of s)."""
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotary is not None:
            q, k = context.rotary.rotate(q), context.rotary.rotate(k)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        if self.recompute_core and self.training:
            return self.proj(recomputed(self._attend, q, k, v, context))
        return self.proj(self._attend(q, k, v, context))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [s, b, h] -> q [s, b, n, d], k and v [s, b, g, d]; if q = 1 they are views of one tensor."""
        heads = self.queries_per_group
        qkv = self.qkv(x)
        length, batch = qkv.shape[:2]  # x may be a part of the sequence
        if heads == 1:
            return qkv.view(length, batch, -1, 3, self.head_dim).unbind(3)
        qkv = qkv.view(length, batch, -1, heads + 2, self.head_dim)
        q, k, v = qkv.split((heads, 1, 1), dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Attention within each sample or document: q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n d]."""
        mask, documents = context.mask, context.documents
        if context.over_ranks is not None:
            seed = partial(self.rng.reseed, "attention", self.layer_number, self.split)
            return context.over_ranks(q, k, v, self.dropout if self.training else 0.0, seed)
        if self.dropout > 0 and self.training:
            q = self.rng.seeded(q, "attention", self.layer_number, self.split)
        if self.kernel is not None and mask is None and q.shape[0] == k.shape[0]:
            cu_seqlens = None if documents is None else documents.cu_seqlens
            dropout = self.dropout if self.training else 0.0
            return self.kernel(q, k, v, slopes=context.slopes, cu_seqlens=cu_seqlens, dropout=dropout).flatten(2, 3)
        if documents is None:
            return self._attention(q, k, v, mask)
        if mask is None and not (self.dropout > 0 and self.training) and self.backend.has_varlen_attention(q):
            return self._varlen_attention(q, k, v, documents)
        return self._document_attention(q, k, v, mask, documents)

    def _varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Attend within all documents in one call, which does not depend on how many there are."""
        length = q.shape[0]
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        # The longest length is an upper bound: constant, so that torch.compile has one graph for all micro-batches.
        out = self.backend.varlen_attention(q, k, v, documents.cu_seqlens, length)
        return out.unflatten(0, (-1, length)).transpose(0, 1).flatten(2, 3)

    # Its shapes change with every micro-batch, and torch.compile would compile each of them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _document_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents) -> Tensor:
        parts = []
        # A length is rarely that of another micro-batch.
        for q_part, k_part, v_part in zip(documents.split(q), documents.split(k), documents.split(v), strict=True):
            # ALiBi's bias depends on the distance of query and key only: that of a document is that of its length.
            length = q_part.shape[0]
            part_mask = None if mask is None else mask[..., :length, :length]
            parts.append(self._attention(q_part, k_part, v_part, part_mask, new_shapes=True))
        return documents.merge(parts, q.shape[0])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, new_shapes: bool = False) -> Tensor:
        """Return softmax(q kᵀ / √d + mask) v: q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n d]."""
        dropout = self.dropout if self.training else 0.0
        # A single query attends to all keys of a cache; several queries without a mask are a complete sample.
        causal = mask is None and q.shape[0] > 1
        # The keys of a decoding step are one more than those of the step before.
        new_shapes = new_shapes or k.shape[0] != q.shape[0]
        out = self.backend.attention(q, k, v, mask, dropout=dropout, causal=causal, new_shapes=new_shapes)
        return out.flatten(2, 3)


def _head_norm(config: ModelConfig, sharding: Sharding) -> Norm | None:
    """Return the norm over a query's or key's channels, if the model has one; its weight is replicated over tp."""
    if not config.qk_layernorm:
        return None
    # Each tp rank normalizes other heads: the gradients are summed over tp.
    return Norm(config.head_dim, config, sharding, partial=sharding.tp.size > 1)
