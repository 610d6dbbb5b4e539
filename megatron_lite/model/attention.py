"""Causal self-attention with any number of key/value heads, through torch's scaled_dot_product_attention.

Letters: s sequence, b micro-batch, h hidden, n query heads and g key/value heads of this rank, q = n/g, d channels of a
head, t tokens in all (s, plus what a cache holds), tp the group's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.batch import Documents
from megatron_lite.model.kv_cache import KVCache
from megatron_lite.model.norms import Norm
from megatron_lite.model.positions import Rotary
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear, Sharding
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.recompute import recomputed


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What all layers of a stage share in one forward."""

    rotary: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    """None: plain causal. See model/positions.py."""
    documents: Documents | None = None
    """Without a mask: the documents that attend apart from each other; None: each sample is one."""
    cache: KVCache | None = None


class SelfAttention(nn.Module):
    """Projects to queries, keys and values, attends, and projects back.

    The qkv projection's output channels lie as Megatron's: for each of the g groups its q query heads, then its key,
    then its value. Cut over tp, a rank then has whole groups.

    Args:
        config: the model.
        layer: the layer's number in the whole model.
        sharding: how this stage's tensors split.
        rng: dropout's streams.
        recompute_core: run the attention itself again in backward instead of keeping what it needs.
    """

    def __init__(
        self, config: ModelConfig, layer: int, sharding: Sharding, rng: RngStreams, recompute_core: bool
    ) -> None:
        super().__init__()
        assert config.num_query_groups % sharding.tp.size == 0, (config.num_query_groups, sharding.tp)
        self.layer = layer
        self.rng = rng
        self.split = sharding.tp.size > 1
        self.dropout = config.attention_dropout
        self.recompute_core = recompute_core
        self.head_dim = config.head_dim
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        self.rotary = Rotary(config) if config.position_embedding == "rotary" else None
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
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: [s/tp, b, h], both)."""
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            assert context.rotary is not None
            q, k = self.rotary(q, context.rotary), self.rotary(k, context.rotary)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        if self.recompute_core and self.training:
            return self.proj(recomputed(self._attend, q, k, v, context.mask, context.documents))
        return self.proj(self._attend(q, k, v, context.mask, context.documents))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [s, b, h] -> q [s, b, n, d], k and v [s, b, g, d]; where q = 1 they are views of one tensor."""
        heads = self.queries_per_group
        qkv = self.qkv(x)
        length, batch = qkv.shape[:2]  # x may be a part of the sequence
        if heads == 1:
            return qkv.view(length, batch, -1, 3, self.head_dim).unbind(3)
        qkv = qkv.view(length, batch, -1, heads + 2, self.head_dim)
        q, k, v = qkv.split((heads, 1, 1), dim=3)
        return q.flatten(2, 3), k.squeeze(3), v.squeeze(3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents | None) -> Tensor:
        """Attention of whole samples, or of each document in them: q [s, b, n, d], k, v [t, b, g, d] -> [s, b, n d]."""
        if self.dropout > 0 and self.training:
            self.rng.reseed("attention", self.layer, self.split)
        return self._weigh(q, k, v, mask) if documents is None else self._weigh_apart(q, k, v, documents)

    # Its shapes change with every micro-batch: compiled, each would be compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _weigh_apart(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        parts = zip(documents.split(q), documents.split(k), documents.split(v), strict=True)
        return documents.merge([self._weigh(*part, None) for part in parts], q.shape[0])

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The sum softmax(q kᵀ / √d + mask) v: q [s, b, n, d], k and v [t, b, g, d] -> [s, b, n d]."""
        if self.queries_per_group > 1 and not _kernel_groups_heads(q, mask):
            k, v = (x.repeat_interleave(self.queries_per_group, dim=2) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3),
            k.permute(1, 2, 0, 3),
            v.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            # One query sees all the keys of a cache; several without a mask are the whole of a sample.
            is_causal=mask is None and q.shape[0] > 1,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return out.permute(2, 0, 1, 3).flatten(2, 3)


def _head_norm(config: ModelConfig, sharding: Sharding) -> Norm | None:
    """A norm over each query's (or key's) channels; tp ranks share its weight and see different heads."""
    if not config.qk_layernorm:
        return None
    return Norm(
        config.head_dim,
        sharding,
        kind=config.normalization,
        epsilon=config.norm_epsilon,
        zero_centered=config.zero_centered_norm,
        partial=sharding.tp.size > 1,
    )


def _kernel_groups_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key/value than query heads; otherwise enable_gqa would avoid them all."""
    return q.is_cuda and mask is None and q.dtype in (torch.float16, torch.bfloat16)
