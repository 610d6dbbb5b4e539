"""LayerNorm and RMSNorm, computed in fp32 whatever the parameters' type.

Letters: s sequence, b micro-batch, n channels that are normalised together.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.config.model import Normalization
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.parameters import NamedParameter, replicated_parameter


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dim: weight [n], bias [n].

    Args:
        size: n.
        sharding: type (also the output's) and device.
        kind: LayerNorm has a bias, RMSNorm has none.
        epsilon: added to the variance.
        zero_centered: the weight is stored as w - 1, so that weight decay pulls it to 1 and bf16 keeps its digits.
        partial: whether each tp rank sees a part of the tokens or heads, so that gradients add up over tp.
    """

    def __init__(
        self,
        size: int,
        sharding: Sharding,
        *,
        kind: Normalization,
        epsilon: float,
        zero_centered: bool,
        partial: bool,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.epsilon = epsilon
        self.zero_centered = zero_centered
        self.partial = partial
        self.weight = sharding.empty(size)
        self.bias = sharding.empty(size) if kind == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., n] -> [..., n] in the parameters' type (x may be fp32: a residual stream kept in fp32)."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        shape = self.weight.shape
        native = x.dtype == weight.dtype and not self.zero_centered
        if not native:
            x, weight = x.float(), weight.float() + (1 if self.zero_centered else 0)
            bias = None if bias is None else bias.float()
        if self.kind == "LayerNorm":
            y = F.layer_norm(x, shape, weight, bias, self.epsilon)
        else:
            y = F.rms_norm(x, shape, weight, self.epsilon)
        return y if native else y.to(self.weight.dtype)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """The norm's parameters under its global name."""
        for suffix, param in (("weight", self.weight), ("bias", self.bias)):
            if param is not None:
                yield replicated_parameter(f"{name}.{suffix}", param, sequence_parallel=self.partial)
