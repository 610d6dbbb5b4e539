"""Tensor-parallel modules: column- and row-parallel and replicated linear layers, vocabulary-parallel embedding.

Each module lists its parameters under global names, with the part of the global tensor that this rank holds.

Letters: s sequence, b micro-batch, h hidden, V padded vocabulary, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group, LocalGroup
from megatron_lite.backend.kernels import Kernels
from megatron_lite.parallel.fp8 import Fp8
from megatron_lite.parallel.gemm import WeightGradients, linear
from megatron_lite.parallel.parameters import NamedParameter, replicated_parameter, vocabulary_parameter
from megatron_lite.parallel.tensor_parallel import (
    column_parallel_linear,
    reduce_from_group,
    reduce_scatter_sequence,
    row_parallel_linear,
)
from megatron_lite.rectangle import Rectangle


@dataclass(frozen=True)
class Sharding:
    """Sharding of a stage's layers: tensor- and context-parallel groups, sequence parallelism, dtype and backend."""

    tp: Group
    sequence_parallel: bool
    dtype: torch.dtype
    backend: Backend
    deferred: WeightGradients | None = None
    """Takes the operands of weight gradients in backward; None: backward computes them."""
    fp8: Fp8 | None = None
    """Formats and scaling of the products of linear layers; None: the dtype."""
    kernels: Kernels = field(default_factory=Kernels)
    """Kernels of norms, attention and loss."""
    cp: Group = field(default_factory=lambda: LocalGroup("cp"))
    """Ranks over which the sequence is split; parameters are the same on all of them."""
    device: torch.device | None = None
    """Of new parameters; None: the backend's."""

    @property
    def split_sequence(self) -> bool:
        """Return whether activations between the parallel layers are split along the sequence: [s/tp, b, h]."""
        return self.sequence_parallel and self.tp.size > 1

    def fp8_modes(self) -> tuple[Fp8 | None, Fp8 | None]:
        """Return the formats and scales of a new linear layer: in evaluation, in training."""
        return (None, None) if self.fp8 is None else self.fp8.modes(self.backend.device)

    def empty(self, *shape: int) -> nn.Parameter:
        """Return an uninitialized parameter of this shape."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device or self.backend.device))


class ColumnParallelLinear(nn.Module):
    """Linear layer y = x Wᵀ + b with output channels split over tp: weight [out/tp, in], bias [out/tp].

    Args:
        in_features: input channels.
        out_features: output channels over all ranks.
        sharding: of the stage.
        bias: whether to add a bias.
        parts: number of equal parts of the output channels (gate and up projection: 2); each part is split over tp.
    """

    def __init__(self, in_features: int, out_features: int, sharding: Sharding, *, bias: bool, parts: int = 1) -> None:
        super().__init__()
        group = sharding.tp
        assert out_features % (parts * group.size) == 0, (out_features, parts, group)
        self.sharding = sharding
        self.parts = parts
        self.fp8 = sharding.fp8_modes()
        self.weight = sharding.empty(out_features // group.size, in_features)
        self.bias = sharding.empty(out_features // group.size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, in] (sequence parallel: [s/tp, b, in]) -> [s, b, out/tp]."""
        sharding, fp8 = self.sharding, self.fp8[self.training]
        return column_parallel_linear(
            x, self.weight, self.bias, sharding.tp, sharding.split_sequence, sharding.deferred, fp8
        )

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the parameters under the module's global name: weight (out, in), or (parts, out/parts, in)."""
        group = self.sharding.tp
        for suffix, param in (("weight", self.weight), ("bias", self.bias)):
            if param is not None:
                rows = param.shape[0] // self.parts
                lead = () if self.parts == 1 else (self.parts,)
                rest = tuple(param.shape[1:])
                yield NamedParameter(
                    name=f"{name}.{suffix}",
                    param=param,
                    global_shape=(*lead, rows * group.size, *rest),
                    tp_dim=len(lead),
                    rectangle=Rectangle(
                        (*(0 for _ in lead), rows * group.rank, *(0 for _ in rest)), (*lead, rows, *rest)
                    ),
                )


class RowParallelLinear(nn.Module):
    """Linear layer y = x Wᵀ + b with input channels split over tp: weight [out, in/tp], bias [out] replicated.

    Args:
        in_features: input channels over all ranks.
        out_features: output channels.
        sharding: of the stage.
        bias: whether to add a bias.
    """

    def __init__(self, in_features: int, out_features: int, sharding: Sharding, *, bias: bool) -> None:
        super().__init__()
        group = sharding.tp
        assert in_features % group.size == 0, (in_features, group)
        self.sharding = sharding
        self.fp8 = sharding.fp8_modes()
        self.weight = sharding.empty(out_features, in_features // group.size)
        self.bias = sharding.empty(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, in/tp] -> [s, b, out] (sequence parallel: [s/tp, b, out])."""
        sharding, fp8 = self.sharding, self.fp8[self.training]
        return row_parallel_linear(
            x, self.weight, self.bias, sharding.tp, sharding.split_sequence, sharding.deferred, fp8
        )

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the parameters under the module's global name."""
        rows, columns = self.weight.shape
        group = self.sharding.tp
        yield NamedParameter(
            name=f"{name}.weight",
            param=self.weight,
            global_shape=(rows, columns * group.size),
            tp_dim=1,
            rectangle=Rectangle((0, columns * group.rank), (rows, columns)),
        )
        if self.bias is not None:
            yield replicated_parameter(f"{name}.bias", self.bias, sequence_parallel=self.sharding.split_sequence)


class ReplicatedLinear(nn.Module):
    """Linear layer y = x Wᵀ + b that every tp rank holds and computes: weight [out, in], bias [out].

    Under sequence parallelism each rank computes its part of the sequence. For a small layer, this costs less than the
    communication of a split one.

    Args:
        in_features: input channels.
        out_features: output channels.
        sharding: of the stage.
        bias: whether to add a bias.
    """

    def __init__(self, in_features: int, out_features: int, sharding: Sharding, *, bias: bool) -> None:
        super().__init__()
        self.split = sharding.split_sequence
        self.weight = sharding.empty(out_features, in_features)
        self.bias = sharding.empty(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, in] -> [s, b, out] (sequence parallel: both [s/tp, b, …])."""
        return linear(x, self.weight, self.bias)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the parameters under the module's global name."""
        for suffix, param in (("weight", self.weight), ("bias", self.bias)):
            if param is not None:
                yield replicated_parameter(f"{name}.{suffix}", param, sequence_parallel=self.split)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with rows of the table split over tp: weight [V/tp, h].

    Args:
        vocab_size: entries of the tokenizer. Rows past them are padding: zero, and not saved.
        padded_vocab_size: V, a multiple of tp.
        hidden_size: h.
        sharding: of the stage.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int, hidden_size: int, sharding: Sharding) -> None:
        super().__init__()
        group = sharding.tp
        assert padded_vocab_size % group.size == 0, (padded_vocab_size, group)
        assert 0 < vocab_size <= padded_vocab_size, (vocab_size, padded_vocab_size)
        self.sharding = sharding
        self.vocab_size = vocab_size
        self.first_row = padded_vocab_size // group.size * group.rank
        self.weight = sharding.empty(padded_vocab_size // group.size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [s, b] -> [s, b, h] (sequence parallel: [s/tp, b, h])."""
        group = self.sharding.tp
        if tokens.device.type == "xla":  # which flattens the tokens: samples that are split over the mesh come first
            return F.embedding(tokens.t(), self.weight).transpose(0, 1)
        if group.size == 1:
            return F.embedding(tokens, self.weight)
        rows = tokens - self.first_row
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.sharding.split_sequence:
            return reduce_scatter_sequence(x, group)
        return reduce_from_group(x, group)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the table, without padding rows, under the module's global name."""
        yield vocabulary_parameter(f"{name}.weight", self.weight, self.vocab_size, self.sharding.tp)
