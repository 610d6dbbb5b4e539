"""Sharded state dict: parameters and optimizer state to save, each with global name, shape and local slice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.rectangle import Rectangle


@dataclass(frozen=True, eq=False)
class Piece:
    """Rectangle of a global tensor with its values: `tensor` has its first element at `offset`."""

    offset: tuple[int, ...]
    tensor: Tensor

    @property
    def rectangle(self) -> Rectangle:
        """Place in the global tensor."""
        return Rectangle(self.offset, tuple(self.tensor.shape))


@dataclass(frozen=True, eq=False)
class GlobalTensor:
    """Pieces of a named global tensor on this rank; several ranks may hold the same piece."""

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece] = field(default_factory=list)
    write: bool = True
    """Whether this rank saves its pieces, if one rank saves them for all that hold them."""
    replica: tuple[int, int] = (0, 1)
    """(i, n): this rank is replica i of n that hold the same pieces; each may save a part of them."""


def parameter_tensor(
    parameter: NamedParameter,
    *,
    write: bool,
    tensor: Tensor | None = None,
    name: str = "",
    replica: tuple[int, int] = (0, 1),
) -> GlobalTensor:
    """Return the global tensor of a parameter, or of a tensor shaped like it.

    Args:
        parameter: gives name, shape and offset.
        write: whether this rank saves it.
        tensor: shaped like the parameter (a moment, a main parameter); None: the parameter's data.
        name: of the global tensor; empty: the parameter's.
        replica: see GlobalTensor.
    """
    local = parameter.local(tensor)
    piece = Piece(parameter.rectangle.offset, local)
    return GlobalTensor(
        name or parameter.name, parameter.global_shape, local.dtype, [piece] if local.numel() else [], write, replica
    )


def narrow(tensor: Tensor, rectangle: Rectangle) -> Tensor:
    """Return a rectangle of a tensor as a view."""
    for dim, (start, length) in enumerate(zip(rectangle.offset, rectangle.shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
