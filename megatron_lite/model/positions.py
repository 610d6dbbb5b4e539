"""How a token knows its place: learned positions, rotary embedding, ALiBi; and who may look at whom.

Letters: s new tokens, t tokens in all (s, plus what a cache holds), b micro-batch, n heads of this rank, d channels of
a head, r the channels that are rotated, h hidden, tp the group's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.config.model import ModelConfig
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.parameters import NamedParameter, replicated_parameter
from megatron_lite.parallel.tensor_parallel import local_slice


class LearnedPositions(nn.Module):
    """GPT-2's table of position vectors: weight [max positions, h], whole on every tp rank.

    Args:
        rows: the longest sequence.
        hidden_size: h.
        sharding: the tp group, whether each rank embeds only its part of the sequence, type and device.
    """

    def __init__(self, rows: int, hidden_size: int, sharding: Sharding) -> None:
        super().__init__()
        self.group = sharding.tp
        self.sequence_parallel = sharding.split_sequence
        self.weight = sharding.empty(rows, hidden_size)

    def forward(self, length: int, start: int, position_ids: Tensor | None) -> Tensor:
        """`length` positions from `start`, or position_ids [b, s] -> [s, 1 or b, h] (sequence parallel: s/tp)."""
        assert start + length <= self.weight.shape[0], f"{start + length} tokens, {self.weight.shape[0]} positions"
        if position_ids is not None:
            ids = position_ids.t()
            return F.embedding(local_slice(ids, self.group) if self.sequence_parallel else ids, self.weight)
        if self.sequence_parallel:
            length //= self.group.size
            start += length * self.group.rank
        return self.weight.narrow(0, start, length).unsqueeze(1)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """The table under its global name."""
        yield replicated_parameter(f"{name}.weight", self.weight, sequence_parallel=self.sequence_parallel)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): channel pairs turned by position * frequency.

    Half style pairs channel i with i + r/2 (Llama, GPT-NeoX); interleaved style pairs 2i with 2i + 1 (GPT-J).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rotated = int(config.head_dim * config.rotary_percent) // 2 * 2
        self.base = config.rotary_base
        self.scaling = config.rotary_scaling
        self.interleaved = config.rotary_interleaved

    def tables(
        self, length: int, start: int, position_ids: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [s, 1 or b, 1, r], of `length` tokens from `start`, or of position_ids [b, s]."""
        channels = torch.arange(0, self.rotated, 2, dtype=torch.float32, device=device)
        frequencies = self.base ** (-channels / self.rotated)
        if position_ids is None:
            positions = torch.arange(start, start + length, dtype=torch.float32, device=device).unsqueeze(1)
        else:
            positions = position_ids.t().float()
        angles = (positions / self.scaling).unsqueeze(-1) * frequencies
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        angles = angles.unsqueeze(2)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """`x` [s, b, n, d] -> the same with its first r channels rotated (in fp32)."""
        cos, sin = tables
        turned, rest = x[..., : self.rotated].float(), x[..., self.rotated :]
        if self.interleaved:
            even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
            partner = torch.stack((-odd, even), dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            partner = torch.cat((-second, first), dim=-1)
        turned = (turned * cos + partner * sin).to(x.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi's slope of every head (Press et al. 2022, arXiv:2108.12409).

    2^(-8/n), 2^(-16/n), … for n a power of two. Otherwise those of the next smaller power, followed by every second
    slope of twice that power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    finer = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(0, 2 * power, 2)]
    return slopes + finer[: num_heads - power]


class AttentionMask(nn.Module):
    """What is added to the attention scores: ALiBi's bias, and -inf where a token may not look.

    Plain causal attention needs no mask in memory: the kernel knows. ALiBi's, s x s for each head, is built once for
    the longest sequence seen and shared by all layers. Documents within a sample need a mask b x s x s a micro-batch
    only beside ALiBi, or where nobody found them on the host (model/documents.py).

    Args:
        config: the model; its heads get slopes if its positions are ALiBi's.
        sharding: the tp group over which heads are split, the scores' type, the bias's device.
    """

    bias: Tensor

    def __init__(self, config: ModelConfig, sharding: Sharding) -> None:
        super().__init__()
        group = sharding.tp
        self.slopes: list[float] = []
        if config.position_embedding == "alibi":
            heads = config.num_attention_heads // group.size
            self.slopes = alibi_slopes(config.num_attention_heads)[heads * group.rank : heads * (group.rank + 1)]
        self.register_buffer(
            "bias", torch.empty(len(self.slopes), 0, 0, dtype=sharding.dtype, device=sharding.device), persistent=False
        )

    def forward(self, length: int, start: int, document_ids: Tensor | None) -> Tensor | None:
        """The mask of `length` queries from `start` on, against all keys before and among them.

        Returns:
            None: causal over the whole of a sample. Else additive [1 or b, n, s, t], or boolean [1 or b, 1, s, t]
            (True: may look).
        """
        total = start + length
        assert document_ids is None or start == 0, "a cache holds one document a row"
        if not self.slopes and document_ids is None and (start == 0 or length == 1):
            return None
        if not self.slopes:
            allowed = self._causal(length, start)
            return allowed if document_ids is None else allowed & _same_document(document_ids)
        if self.bias.shape[-1] < total:
            self.bias = self._alibi(total)
        bias = self.bias[:, start:total, :total].unsqueeze(0)
        if document_ids is not None:
            bias = bias.masked_fill(~_same_document(document_ids), float("-inf"))
        return bias

    def _causal(self, length: int, start: int) -> Tensor:
        queries = torch.arange(start, start + length, device=self.bias.device).unsqueeze(1)
        keys = torch.arange(start + length, device=self.bias.device)
        return (keys <= queries).view(1, 1, length, start + length)

    def _alibi(self, length: int) -> Tensor:
        """Slope * (key's position - query's), and -inf right of the diagonal: [n, s, s]."""
        positions = torch.arange(length, dtype=torch.float32, device=self.bias.device)
        distance = positions - positions.unsqueeze(1)
        distance = distance.masked_fill(distance > 0, float("-inf"))
        slopes = torch.tensor(self.slopes, device=self.bias.device).view(-1, 1, 1)
        return (slopes * distance).to(self.bias.dtype)


def _same_document(document_ids: Tensor) -> Tensor:
    """document_ids [b, s] -> [b, 1, s, s]: whether query and key lie in one document."""
    return (document_ids.unsqueeze(2) == document_ids.unsqueeze(1)).unsqueeze(1)
