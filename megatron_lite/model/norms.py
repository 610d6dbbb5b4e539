"""LayerNorm and RMSNorm, computed in fp32 for every parameter dtype.

Letters: n normalized channels.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig, Normalization
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.parameters import NamedParameter, replicated_parameter


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dim: weight [n], bias [n].

    A zero-centered norm stores weight - 1: weight decay pulls the weight to 1, and bf16 keeps more digits.

    Args:
        size: n.
        config: the model's epsilon, and whether norms are zero-centered.
        sharding: dtype (of parameters and output) and device.
        partial: whether each tp rank normalizes a part of the tokens or heads, so that gradients are summed over tp.
        kind: LayerNorm or RMSNorm (which has no bias); None: the model's.
    """

    def __init__(
        self,
        size: int,
        config: ModelConfig,
        sharding: Sharding,
        *,
        partial: bool,
        kind: Normalization | None = None,
    ) -> None:
        super().__init__()
        self.kernel = sharding.kernels.norm
        self.epsilon = config.norm_epsilon
        self.zero_centered = config.zero_centered_norm
        self.partial = partial
        self.weight = sharding.empty(size)
        self.bias = sharding.empty(size) if (kind or config.normalization) == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., n] -> [..., n] in the parameters' dtype (x may be fp32: a residual stream kept in fp32)."""
        return self.kernel(x, self.weight, self.bias, self.epsilon, self.zero_centered)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the parameters under the module's global name."""
        for suffix, param in (("weight", self.weight), ("bias", self.bias)):
            if param is not None:
                yield replicated_parameter(f"{name}.{suffix}", param, sequence_parallel=self.partial)
