"""Linear layers and the embedding, split over the tp axis. Each layer says which part of its global tensors it holds.

Letters: s sequence, b micro-batch, h hidden, V padded vocabulary, tp the group's size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.backend.group import Group
from megatron_lite.parallel.collectives import reduce_from_group, reduce_scatter_sequence
from megatron_lite.parallel.linear import column_parallel_linear, row_parallel_linear
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.sharding import Sharding


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b, output channels split over tp: weight [out/tp, in], bias [out/tp].

    Args:
        in_features: input channels.
        out_features: output channels of the whole layer.
        sharding: the tp group, whether the input is split along the sequence, type and device.
        bias: whether there is one.
        parts: equal parts that the output channels consist of (gate and up: 2), each of them split over tp.
    """

    def __init__(self, in_features: int, out_features: int, sharding: Sharding, *, bias: bool, parts: int = 1) -> None:
        super().__init__()
        group = sharding.tp
        assert out_features % (parts * group.size) == 0, (out_features, parts, group)
        self.group = group
        self.sequence_parallel = sharding.split_sequence
        self.weight_gradients = sharding.weight_gradients
        self.parts = parts
        self.weight = sharding.empty(out_features // group.size, in_features)
        self.bias = sharding.empty(out_features // group.size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, in] (sequence parallel: [s/tp, b, in]) -> [s, b, out/tp]."""
        return column_parallel_linear(
            x, self.weight, self.bias, self.group, self.sequence_parallel, self.weight_gradients
        )

    def named(self, name: str) -> Iterator[NamedParameter]:
        """The layer's parameters under its global name: weight (out, in), or (parts, out/parts, in)."""
        for suffix, param in (("weight", self.weight), ("bias", self.bias)):
            if param is not None:
                rows = param.shape[0] // self.parts
                lead = () if self.parts == 1 else (self.parts,)
                rest = tuple(param.shape[1:])
                yield NamedParameter(
                    name=f"{name}.{suffix}",
                    param=param,
                    global_shape=(*lead, rows * self.group.size, *rest),
                    tp_dim=len(lead),
                    local_shape=(*lead, rows, *rest),
                    offset=(*(0 for _ in lead), rows * self.group.rank, *(0 for _ in rest)),
                )


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b, input channels split over tp: weight [out, in/tp], bias [out] whole on every rank.

    Args:
        in_features: input channels of the whole layer.
        out_features: output channels.
        sharding: the tp group, whether the output is split along the sequence, type and device.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, sharding: Sharding, *, bias: bool) -> None:
        super().__init__()
        group = sharding.tp
        assert in_features % group.size == 0, (in_features, group)
        self.group = group
        self.sequence_parallel = sharding.split_sequence
        self.weight_gradients = sharding.weight_gradients
        self.weight = sharding.empty(out_features, in_features // group.size)
        self.bias = sharding.empty(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, in/tp] -> [s, b, out] (sequence parallel: [s/tp, b, out])."""
        return row_parallel_linear(x, self.weight, self.bias, self.group, self.sequence_parallel, self.weight_gradients)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """The layer's parameters under its global name."""
        rows, columns = self.weight.shape
        yield NamedParameter(
            name=f"{name}.weight",
            param=self.weight,
            global_shape=(rows, columns * self.group.size),
            tp_dim=1,
            local_shape=(rows, columns),
            offset=(0, columns * self.group.rank),
        )
        if self.bias is not None:
            yield whole_parameter(f"{name}.bias", self.bias, sequence_parallel=self.sequence_parallel)


class VocabParallelEmbedding(nn.Module):
    """A table of token vectors whose rows are split over tp: weight [V/tp, h].

    Args:
        vocab_size: entries of the tokenizer. Rows past them are padding: zero, and never saved.
        padded_vocab_size: V, which tp divides.
        hidden_size: h.
        sharding: the tp group, whether the output is split along the sequence, type and device.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, sharding: Sharding) -> None:
        super().__init__()
        group = sharding.tp
        assert padded_vocab_size % group.size == 0, (padded_vocab_size, group)
        assert 0 < vocab_size <= padded_vocab_size, (vocab_size, padded_vocab_size)
        self.group = group
        self.sequence_parallel = sharding.split_sequence
        self.vocab_size = vocab_size
        self.first_row = padded_vocab_size // group.size * group.rank
        self.weight = sharding.empty(padded_vocab_size // group.size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [s, b] -> [s, b, h] (sequence parallel: [s/tp, b, h])."""
        if self.group.size == 1:
            return F.embedding(tokens, self.weight)
        rows = tokens - self.first_row
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.sequence_parallel:
            return reduce_scatter_sequence(x, self.group)
        return reduce_from_group(x, self.group)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """The table's logical rows under its global name."""
        yield vocabulary_parameter(f"{name}.weight", self.weight, self.vocab_size, self.group)


def vocabulary_parameter(
    name: str, param: nn.Parameter, vocab_size: int, group: Group, owned: bool = True
) -> NamedParameter:
    """A [V/tp, h] table as the logical rows that this rank holds of (vocab_size, h); none, where all are padding."""
    rows, hidden = param.shape
    first = min(rows * group.rank, vocab_size)
    return NamedParameter(
        name=name,
        param=param,
        global_shape=(vocab_size, hidden),
        tp_dim=0,
        local_shape=(min(rows * (group.rank + 1), vocab_size) - first, hidden),
        offset=(first, 0),
        owned=owned,
    )


def whole_parameter(name: str, param: nn.Parameter, *, sequence_parallel: bool) -> NamedParameter:
    """A parameter that every tp rank holds the whole of."""
    shape = tuple(param.shape)
    return NamedParameter(
        name=name,
        param=param,
        global_shape=shape,
        tp_dim=None,
        local_shape=shape,
        offset=(0,) * len(shape),
        sequence_parallel=sequence_parallel,
    )
