"""One transformer layer: attention and MLP, each behind a norm and beside a residual.

Letters: s sequence, b micro-batch, h hidden, tp the group's size.
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
    """A pre-norm layer (GPT-2's).

    Args:
        config: the model.
        layer: the layer's number in the whole model.
        sharding: how this stage's tensors split.
        rng: dropout's streams.
        recompute_core: run the attention itself again in backward.
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
        self.input_norm = hidden_norm(config, sharding)
        self.self_attention = SelfAttention(config, layer, sharding, rng, recompute_core)
        self.pre_mlp_norm = hidden_norm(config, sharding)
        self.mlp = MLP(config, sharding)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: [s/tp, b, h], both)."""
        normed = self.input_norm(x)
        x = self._add(normed if self.residual_after_norm else x, self.self_attention(normed, context), "proj")
        normed = self.pre_mlp_norm(x)
        return self._add(normed if self.residual_after_norm else x, self.mlp(normed), "mlp")

    def _add(self, residual: Tensor, branch: Tensor, site: str) -> Tensor:
        if self.dropout > 0 and self.training:
            self.rng.reseed(site, self.layer, self.split)
            branch = F.dropout(branch, self.dropout)
        return residual + branch


def hidden_norm(config: ModelConfig, sharding: Sharding) -> Norm:
    """A norm over the hidden size, of the kind that the model uses."""
    return Norm(
        config.hidden_size,
        sharding,
        kind=config.normalization,
        epsilon=config.norm_epsilon,
        zero_centered=config.zero_centered_norm,
        partial=sharding.split_sequence,
    )
