"""Position embeddings (learned, rotary, ALiBi) and attention masks.

Letters: s new tokens, t tokens in all (s, and those of a cache), b micro-batch, n heads of this rank, d channels of a
head, r rotated channels, h hidden, tp size of the tensor-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.backend.group import Group
from megatron_lite.config.model import ModelConfig
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.parameters import NamedParameter, replicated_parameter
from megatron_lite.parallel.tensor_parallel import local_slice


class LearnedPositions(nn.Module):
    """Learned absolute position embedding (GPT-2): weight [max positions, h], replicated over tp.

    Args:
        rows: longest sequence.
        hidden_size: h.
        sharding: of the stage.
    """

    def __init__(self, rows: int, hidden_size: int, sharding: Sharding) -> None:
        super().__init__()
        self.sharding = sharding
        self.weight = sharding.empty(rows, hidden_size)

    def forward(self, length: int, position_ids: Tensor | None) -> Tensor:
        """Positions 0 to `length`, or position_ids [b or 1, s] -> [s, 1 or b, h] (sequence parallel: s/tp)."""
        assert length <= self.weight.shape[0], f"{length} tokens, {self.weight.shape[0]} positions"
        start = 0
        group, split = self.sharding.tp, self.sharding.split_sequence
        if position_ids is not None:
            ids = position_ids.t()
            return F.embedding(local_slice(ids, group) if split else ids, self.weight)
        if split:
            length //= group.size
            start = length * group.rank
        return self.weight.narrow(0, start, length).unsqueeze(1)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the table under the module's global name."""
        yield replicated_parameter(f"{name}.weight", self.weight, sequence_parallel=self.sharding.split_sequence)


class RotaryTable(NamedTuple):
    """Cosines and sines of rotation angles, computed once per forward and used by all layers of a stage.

    Attributes:
        cos: [s, 1 or b, 1, r] fp32.
        sin: like cos.
        interleaved: rotate channels 2i and 2i + 1 (GPT-J); False: channels i and i + r/2 (Llama, GPT-NeoX).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def rotate(self, x: Tensor) -> Tensor:
        """`x` [s, b, n, d] -> the same with its first r channels rotated, computed in fp32."""
        rotated = self.cos.shape[-1]
        turned, rest = x[..., :rotated].float(), x[..., rotated:]
        if self.interleaved:
            even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
            partner = torch.stack((-odd, even), dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            partner = torch.cat((-second, first), dim=-1)
        turned = (turned * self.cos + partner * self.sin).to(x.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): rotates channel pairs by position * frequency."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rotated = int(config.head_dim * config.rotary_percent) // 2 * 2
        self.base = config.rotary_base
        self.scaling = config.rotary_scaling
        self.interleaved = config.rotary_interleaved

    def forward(self, length: int, position_ids: Tensor | None, device: torch.device) -> RotaryTable:
        """Return the table of positions 0 to `length`, or of position_ids [b or 1, s]."""
        channels = torch.arange(0, self.rotated, 2, dtype=torch.float32, device=device)
        frequencies = self.base ** (-channels / self.rotated)
        if position_ids is None:
            positions = torch.arange(length, dtype=torch.float32, device=device).unsqueeze(1)
        else:
            positions = position_ids.t().float()
        angles = (positions / self.scaling).unsqueeze(-1) * frequencies
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        angles = angles.unsqueeze(2)
        return RotaryTable(angles.cos(), angles.sin(), self.interleaved)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return ALiBi's slope of each head (Press et al. 2022, arXiv:2108.12409).

    2^(-8/n), 2^(-16/n), ... for n a power of two. Otherwise those of the next smaller power, followed by every second
    slope of twice that power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    finer = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)]
    return slopes + finer[: num_heads - power]


def rank_slopes(config: ModelConfig, tp: Group) -> list[float]:
    """Return ALiBi's slopes of this rank's heads; empty: the model has no ALiBi."""
    if config.position_embedding != "alibi":
        return []
    heads = config.num_attention_heads // tp.size
    return alibi_slopes(config.num_attention_heads)[heads * tp.rank : heads * (tp.rank + 1)]


class AttentionMask(nn.Module):
    """Attention mask in memory where the causal kernel does not suffice: ALiBi's bias, rows of a cache.

    ALiBi's bias, s x s for each head, is built once for the longest sequence so far and shared by all layers. Documents
    within a sample need no mask (model/batch.py).

    Args:
        config: the model; with ALiBi each head has a slope.
        sharding: of the stage; heads are split over tp.
    """

    slopes: Tensor | None
    """Slope of each head of this rank, [n] fp32; None: the model has no ALiBi."""
    bias: Tensor

    def __init__(self, config: ModelConfig, sharding: Sharding) -> None:
        super().__init__()
        device, slopes = sharding.backend.device, rank_slopes(config, sharding.tp)
        self.register_buffer("slopes", torch.tensor(slopes, device=device) if slopes else None, persistent=False)
        bias = torch.empty(len(slopes), 0, 0, dtype=sharding.dtype, device=device)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, length: int) -> Tensor | None:
        """Return the mask of a sample of `length` tokens: ALiBi's bias [1, n, s, s], or None: causal."""
        if self.slopes is None:
            return None
        if self.bias.shape[-1] < length:
            self.bias = self._alibi(self.slopes, torch.arange(length, device=self.bias.device), length)
        return self.bias[:, :length, :length].unsqueeze(0)

    def of_single_tokens(self, positions: Tensor, total: int, aligned: bool) -> Tensor | None:
        """Return the mask of one query per row over `total` keys, those after the query excluded.

        Args:
            positions: [b] of the queries.
            total: number of keys, t.
            aligned: True if all queries are at the last key.

        Returns:
            ALiBi's bias [b, n, 1, t]; otherwise boolean [b, 1, 1, t] (True: the query attends to the key), or None:
            each query attends to all keys.
        """
        if self.slopes is not None:
            return self._alibi(self.slopes, positions, total).transpose(0, 1).unsqueeze(2)
        if aligned:
            return None
        keys = torch.arange(total, device=positions.device)
        return (keys <= positions.unsqueeze(1)).view(-1, 1, 1, total)

    def _alibi(self, slopes: Tensor, queries: Tensor, total: int) -> Tensor:
        """Return slope * (key position - query position), and -inf for keys after the query: [n, queries, t]."""
        keys = torch.arange(total, dtype=torch.float32, device=queries.device)
        distance = keys - queries.unsqueeze(1)
        distance = distance.masked_fill(distance > 0, float("-inf"))
        return (slopes.view(-1, 1, 1) * distance).to(self.bias.dtype)
