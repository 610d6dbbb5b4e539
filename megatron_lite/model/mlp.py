"""MLP (feed-forward block): two linear layers with an activation between them, gated or not.

Letters: s sequence, b micro-batch, h hidden, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.config.model import Activation, ModelConfig
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear, Sharding


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
