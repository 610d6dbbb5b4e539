"""Row reordering of Megatron-LM tensor-parallel shards: QKV by checkpoint version, gate and up of gated MLPs.

They must be undone on each rank's part before the parts are joined: joining first mixes heads of different ranks.
Letters: n heads of this rank, d channels of a head, f rows of a rank's MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lite.config.model import ModelConfig
from megatron_lite.errors import CheckpointError

Shape = tuple[int, ...]
VERSIONS = (0.0, 1.0, 2.0, 3.0)
CURRENT_VERSION = 3.0


class Arrangement(Protocol):
    """A rank's part in their order and in ours."""

    def ours_shape(self, shape: Shape) -> Shape:
        """Return the shape of our part for the shape of theirs."""

    def to_ours(self, part: Tensor) -> Tensor:
        """Return our part; a copy unless the order is the same."""

    def to_theirs(self, part: Tensor) -> Tensor:
        """Return their part: the inverse of to_ours."""


@dataclass(frozen=True)
class HeadsLast:
    """QKV of checkpoint version 0: [3, n, d, ...] instead of [n, 3, d, ...]."""

    head_dim: int

    def ours_shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape

    def to_ours(self, part: Tensor) -> Tensor:
        """Put each head's q, k, v side by side."""
        rows = part.reshape(3, -1, self.head_dim, *part.shape[1:])
        return rows.transpose(0, 1).reshape(part.shape)

    def to_theirs(self, part: Tensor) -> Tensor:
        """Put all q first, then all k, then all v."""
        rows = part.reshape(-1, 3, self.head_dim, *part.shape[1:])
        return rows.transpose(0, 1).reshape(part.shape)


@dataclass(frozen=True)
class ThirdsLast:
    """QKV of checkpoint version 1.0: [n, d, 3, ...] instead of [n, 3, d, ...]."""

    head_dim: int

    def ours_shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape

    def to_ours(self, part: Tensor) -> Tensor:
        """Put each head's q, k, v side by side."""
        rows = part.reshape(-1, self.head_dim, 3, *part.shape[1:])
        return rows.transpose(1, 2).reshape(part.shape)

    def to_theirs(self, part: Tensor) -> Tensor:
        """Interleave q, k and v channel by channel."""
        rows = part.reshape(-1, 3, self.head_dim, *part.shape[1:])
        return rows.transpose(1, 2).reshape(part.shape)


@dataclass(frozen=True)
class Halves:
    """First projection of a gated MLP: [2 f, ...], gate first, or up first (Megatron-DeepSpeed), as [2, f, ...]."""

    gate_first: bool

    def ours_shape(self, shape: Shape) -> Shape:
        """Return [2, f, ...]."""
        return (2, shape[0] // 2, *shape[1:])

    def to_ours(self, part: Tensor) -> Tensor:
        """Return gate and up."""
        halves = part.reshape(2, -1, *part.shape[1:])
        return halves if self.gate_first else halves.flip(0)

    def to_theirs(self, part: Tensor) -> Tensor:
        """Return both end to end."""
        return (part if self.gate_first else part.flip(0)).flatten(0, 1)


def arrangement_of(ours: str, model: ModelConfig, version: float, *, gate_first: bool = True) -> Arrangement | None:
    """Return how a rank's part of a parameter is arranged; None: as ours.

    Args:
        ours: our name.
        model: the model.
        version: the checkpoint's version.
        gate_first: order of the halves of a gated MLP.

    Raises:
        CheckpointError: the version has no order for grouped queries.
    """
    if ".self_attention.qkv." in ours and version < 2:
        if model.num_query_groups != model.num_attention_heads:
            raise CheckpointError(
                f"The checkpoint has {model.num_query_groups} query groups and checkpoint_version {version:g}, of "
                "which the order of the "
                "QKV rows is not defined",
                rule="Grouped-query attention exists in checkpoints of version 3.0 only",
                fix="Remove --num-query-groups and --checkpoint-version if they are given; otherwise save the "
                "checkpoint again "
                "with a current Megatron-LM",
            )
        return ThirdsLast(model.head_dim) if version == 1 else HeadsLast(model.head_dim)
    if ".mlp.fc1." in ours and model.gated:
        return Halves(gate_first)
    return None
