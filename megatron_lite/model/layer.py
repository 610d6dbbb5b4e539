"""Transformer layer: MLP (feed-forward block) and pre-norm residual connections around attention and MLP.

Letters: s sequence, b micro-batch, h hidden, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.config.model import Activation, ModelConfig
from megatron_lite.model.attention import AttentionContext, SelfAttention
from megatron_lite.model.norms import Norm
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear, Sharding
from megatron_lite.parallel.random import RngStreams, layer_number


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh approximation, as in GPT-2 and Megatron's fused kernel."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)² (So et al. 2021, Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """Return `x`: the gate of LiGLU is linear."""
    return x


# Gated: activation(gate) * up (Shazeer 2020, arXiv:2002.05202).
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "liglu": identity,
}


class MLP(nn.Module):
    """MLP fc2(activation(fc1(x))); if gated fc2(activation(gate) * up), where fc1 computes gate, then up."""

    def __init__(self, config: ModelConfig, sharding: Sharding) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = ACTIVATIONS[config.activation]
        parts = 2 if config.gated else 1
        hidden, width = config.hidden_size, config.ffn_hidden_size
        self.fc1 = ColumnParallelLinear(hidden, parts * width, sharding, bias=config.linear_bias, parts=parts)
        self.fc2 = RowParallelLinear(width, hidden, sharding, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, h] -> [s, b, h] (sequence parallel: both [s/tp, b, h])."""
        y = self.fc1(x)
        if self.gated:
            gate, up = torch.chunk(y, 2, dim=-1)
            return self.fc2(self.activation(gate) * up)
        return self.fc2(self.activation(y))


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
        self.layer = layer_number(layer)
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
            attended = self.self_attention(normed, context)
            # After attention: its dropout uses the generator between its seed and its end.
            beside = self._add(x, self.mlp(self.pre_mlp_norm(x)), "mlp", after=attended)
            return self._add(beside, attended, "proj")
        x = self._add(normed if self.residual_after_norm else x, self.self_attention(normed, context), "proj")
        normed = self.pre_mlp_norm(x)
        return self._add(normed if self.residual_after_norm else x, self.mlp(normed), "mlp")

    def _add(self, residual: Tensor, branch: Tensor, site: str, after: Tensor | None = None) -> Tensor:
        """Return the residual plus the branch after dropout."""
        if self.dropout > 0 and self.training:
            branch = self.rng.dropout(branch, self.dropout, site, self.layer, self.split, after)
        return residual + branch


def hidden_norm(config: ModelConfig, sharding: Sharding) -> Norm:
    """Return a norm over the hidden size."""
    return Norm(config.hidden_size, config, sharding, partial=sharding.split_sequence)
