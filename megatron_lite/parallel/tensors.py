"""Named global tensors and the pieces of them that a rank holds: what checkpoints are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.parallel.parameters import NamedParameter


@dataclass(frozen=True, eq=False)
class Piece:
    """A rectangle of a global tensor: `tensor` lies with its first element at `offset`."""

    offset: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class GlobalTensor:
    """What this rank holds of a named global tensor; several ranks may hold the same piece."""

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece] = field(default_factory=list)
    write: bool = True
    """Whether this rank is the one that saves its pieces, where one rank saves them for all that hold them."""
    replica: tuple[int, int] = (0, 1)
    """(i, n): this rank is the i-th of n that hold the same pieces, and each of them may save a part."""


def parameter_tensor(
    parameter: NamedParameter,
    *,
    write: bool,
    tensor: Tensor | None = None,
    name: str = "",
    replica: tuple[int, int] = (0, 1),
) -> GlobalTensor:
    """The global tensor of a parameter, or of something shaped like it.

    Args:
        parameter: whose name, shape and place are taken.
        write: whether this rank saves it.
        tensor: a tensor shaped like the parameter (a moment, a main parameter); None: the parameter's own data.
        name: the global tensor's name; empty: the parameter's.
        replica: as GlobalTensor has it.
    """
    local = parameter.local(tensor)
    piece = Piece(parameter.offset, local)
    return GlobalTensor(
        name or parameter.name, parameter.global_shape, local.dtype, [piece] if local.numel() else [], write, replica
    )
