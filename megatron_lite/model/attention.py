"""Causal self-attention: multi-head or grouped-query, computed by the backend's kernel, and its KV cache.

Letters: s sequence, b micro-batch, h hidden, n query heads and g key/value heads of this rank, q = n/g, d channels of a
head, t tokens in all (s, and those of a cache), tp size of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.batch import Documents
from megatron_lite.model.norms import Norm
from megatron_lite.model.positions import RotaryTable
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear, Sharding
from megatron_lite.parallel.random import RngStreams, layer_number
from megatron_lite.parallel.recompute import recomputed


class KVCache:
    """Keys and values [T, b, g, d] of each layer of a stage, for generation; T is the maximum length.

    All rows of the batch have the same length.

    Args:
        layers: numbers of the stage's layers in the whole model.
        shape: (T, b, g, d).
        dtype: of the model's parameters.
        device: of the model.
    """

    def __init__(
        self, layers: Iterable[int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._store = {layer: torch.empty((2, *shape), dtype=dtype, device=device) for layer in layers}
        self.max_length = shape[0]
        self.length = 0
        """Number of cached tokens."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's key and value [s, b, g, d]; return those of all tokens, [length + s, b, g, d].

        The length changes in advance(), once every layer has appended.
        """
        end = self.length + key.shape[0]
        assert end <= self.max_length, f"{end} tokens exceed the cache's {self.max_length}"
        keys, values = self._store[layer]
        keys[self.length : end] = key
        values[self.length : end] = value
        return keys[:end], values[:end]

    def advance(self, tokens: int) -> None:
        """Add `tokens` to the number of cached tokens."""
        self.length += tokens


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Inputs of attention that all layers of a stage share in one forward pass."""

    rotary: RotaryTable | None = None
    """None: the model has no rotary position embedding."""
    mask: Tensor | None = None
    """ALiBi's bias, or the mask of queries after a cache (positions.AttentionMask); None: causal."""
    documents: Documents | None = None
    """Documents that attention is restricted to; None: each sample is one document."""
    cache: KVCache | None = None


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
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])."""
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotary is not None:
            q, k = context.rotary.rotate(q), context.rotary.rotate(k)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        if self.recompute_core and self.training:
            return self.proj(recomputed(self._attend, q, k, v, context.mask, context.documents))
        return self.proj(self._attend(q, k, v, context.mask, context.documents))

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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents | None) -> Tensor:
        """Attention within each sample or document: q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n d]."""
        if self.dropout > 0 and self.training:
            q = self.rng.seeded(q, "attention", self.layer_number, self.split)
        if documents is None:
            return self._attention(q, k, v, mask)
        return self._document_attention(q, k, v, mask, documents)

    # Its shapes change with every micro-batch, and torch.compile would compile each of them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _document_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents) -> Tensor:
        parts = []
        for q_part, k_part, v_part in zip(documents.split(q), documents.split(k), documents.split(v), strict=True):
            # ALiBi's bias depends on the distance of query and key only: that of a document is that of its length.
            length = q_part.shape[0]
            part_mask = None if mask is None else mask[..., :length, :length]
            parts.append(self._attention(q_part, k_part, v_part, part_mask))
        return documents.merge(parts, q.shape[0])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return softmax(q kᵀ / √d + mask) v: q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n d]."""
        dropout = self.dropout if self.training else 0.0
        # A single query attends to all keys of a cache; several queries without a mask are a complete sample.
        causal = mask is None and q.shape[0] > 1
        return self.backend.attention(q, k, v, mask, dropout=dropout, causal=causal).flatten(2, 3)


def _head_norm(config: ModelConfig, sharding: Sharding) -> Norm | None:
    """Return the norm over a query's or key's channels, if the model has one; its weight is replicated over tp."""
    if not config.qk_layernorm:
        return None
    # Each tp rank normalizes other heads: the gradients are summed over tp.
    return Norm(config.head_dim, config, sharding, partial=sharding.tp.size > 1)
