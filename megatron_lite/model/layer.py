"""Transformer layer: pre-norm attention and MLP with residual connections.

Letters: s sequence, b micro-batch, h hidden, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.attention import AttentionContext, SelfAttention
from megatron_lite.model.mlp import MLP
from megatron_lite.model.norms import Norm
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.random import RngStreams


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer (GPT-2); with a parallel residual, attention and MLP read the same input (GPT-J).

    Args:
        config: the model.
        layer: number of the layer in the whole model.
        sharding: of the stage.
        rng: dropout streams.
        recompute_core: recompute the attention in backward.
    """

    def __init__(
        self, config: ModelConfig, layer: int, sharding: Sharding, rng: RngStreams, recompute_core: bool
    ) -> None:
        super().__init__()
        self.layer = layer
        self.rng = rng
        self.dropout = config.hidden_dropout
        self.split = sharding.split_sequence
        self.residual_after_norm = config.residual_post_layernorm
        self.parallel = config.parallel_residual
        self.input_norm = hidden_norm(config, sharding)
        self.self_attention = SelfAttention(config, layer, sharding, rng, recompute_core)
        self.pre_mlp_norm = hidden_norm(config, sharding)
        self.mlp = MLP(config, sharding)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])."""
        normed = self.input_norm(x)
        if self.parallel:
            beside = self._add(x, self.mlp(self.pre_mlp_norm(x)), "mlp")
            return self._add(beside, self.self_attention(normed, context), "proj")
        x = self._add(normed if self.residual_after_norm else x, self.self_attention(normed, context), "proj")
        normed = self.pre_mlp_norm(x)
        return self._add(normed if self.residual_after_norm else x, self.mlp(normed), "mlp")

    def _add(self, residual: Tensor, branch: Tensor, site: str) -> Tensor:
        """Return the residual plus the branch after dropout."""
        if self.dropout > 0 and self.training:
            self.rng.reseed(site, self.layer, self.split)
            branch = F.dropout(branch, self.dropout)
        return residual + branch


def hidden_norm(config: ModelConfig, sharding: Sharding) -> Norm:
    """Return a norm over the hidden size."""
    return Norm(config.hidden_size, config, sharding, partial=sharding.split_sequence)
