"""Reversible tensor transforms between megatron_lite's layout and others': transpose, QKV order, gate and up, norms.

A transform maps one tensor of ours to one or more of theirs (`split`) and back (`join`); `join(split(x))` is x bit for
bit, but for the norms' +1, which rounds. Letters: g key/value groups, q query heads of a group, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Transform(Protocol):
    """One tensor of ours as one or more of theirs."""

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of their tensors for the shape of ours."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return their tensors."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return our tensor: the inverse of split."""


@dataclass(frozen=True)
class Same:
    """The same tensor."""

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the one shape."""
        return (shape,)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return it."""
        return (tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return it."""
        (part,) = parts
        return part


@dataclass(frozen=True)
class Rows:
    """Their table has more rows than the vocabulary: the rest is padding, zero on export and cut off on import."""

    rows: int

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the padded shape."""
        return ((self.rows, *shape[1:]),)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Add the padding."""
        padding = tensor.new_zeros(self.rows - tensor.shape[0], *tensor.shape[1:])
        return (torch.cat((tensor, padding)),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the rows as they are: whoever reads takes as many as the vocabulary has."""
        (part,) = parts
        return part


@dataclass(frozen=True)
class Transposed:
    """Another transform whose only tensor is transposed, [out, in] to [in, out] (GPT-2's Conv1D)."""

    inner: Transform = Same()

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the reversed shape."""
        (inner,) = self.inner.shapes(shape)
        return (inner[::-1],)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the transposed tensor."""
        (inner,) = self.inner.split(tensor)
        return (inner.t(),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Transpose back."""
        (part,) = parts
        return self.inner.join((part.t(),))


@dataclass(frozen=True)
class SplitQKV:
    """Queries, keys and values apart: [g (q + 2) d, ...] to [g q d, ...], [g d, ...], [g d, ...]."""

    groups: int
    queries: int
    head_dim: int

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the three shapes."""
        rows = self.groups * self.head_dim
        return ((rows * self.queries, *shape[1:]), (rows, *shape[1:]), (rows, *shape[1:]))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each with the heads in order."""
        grouped = tensor.reshape(self.groups, self.queries + 2, self.head_dim, *tensor.shape[1:])
        parts = grouped.split((self.queries, 1, 1), dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in parts)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave them by group."""
        grouped = [part.reshape(self.groups, -1, self.head_dim, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class JoinedQKV:
    """Queries, keys and values one after the other in one tensor: [g (q + 2) d, ...] to [q..., k..., v...]."""

    apart: SplitQKV

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the one shape."""
        return (shape,)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return all queries, all keys, all values, end to end."""
        return (torch.cat(self.apart.split(tensor)),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave them by group."""
        (part,) = parts
        heads = self.apart.groups * self.apart.head_dim
        return self.apart.join(part.split((heads * self.apart.queries, heads, heads)))


@dataclass(frozen=True)
class GateUp:
    """The two halves of a gated MLP's first projection apart: [2, ffn, ...] to gate and up [ffn, ...]."""

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the two shapes."""
        return (shape[1:], shape[1:])

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return gate and up."""
        return tuple(tensor.unbind(0))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack gate and up."""
        return torch.stack(tuple(parts))


@dataclass(frozen=True)
class PlusOne:
    """A norm's weight that is stored as w - 1 (zero-centered), as w."""

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the one shape."""
        return (shape,)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return w, computed in fp32."""
        return ((tensor.float() + 1).to(tensor.dtype),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return w - 1."""
        (part,) = parts
        return (part.float() - 1).to(part.dtype)
