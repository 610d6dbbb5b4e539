"""Gradient and parameter norms over all ranks, each element counted once in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.backend.group import Group
from megatron_lite.parallel.buffers import Shard, ShardPiece
from megatron_lite.parallel.parameters import NamedParameter

_ROW = 4096


@dataclass(frozen=True)
class Measure:
    """What is summed over the parameters' elements of this rank that no other rank counts too.

    A tied copy is counted where it is owned, and a parameter that every tp rank holds is counted on the first.

    Args:
        shards: of this rank.
        tp_rank: this rank's coordinate along tp.
        group: the ranks whose shards together hold the model once: tp and pp, and dp under ZeRO-1.
    """

    shards: Sequence[Shard]
    tp_rank: int
    group: Group

    def counts(self, parameter: NamedParameter) -> bool:
        """Whether it is this tensor-parallel rank and this stage that counts (and saves) the parameter."""
        return parameter.owned and (parameter.tp_dim is not None or self.tp_rank == 0)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum of squares over this rank's share: a float64 scalar.

        Args:
            tensors: one flat tensor for each shard.
        """
        return self._total(tensors, _squares)

    def zeros(self, tensors: Sequence[Tensor]) -> Tensor:
        """Number of elements equal to zero in this rank's share, padding left out: a float64 scalar."""
        pieces = [piece for shard in self.shards for piece in shard.pieces if self.counts(piece.parameter)]
        elements = sum(_logical(piece) for piece in pieces)
        nonzero = self._total(tensors, lambda part: part.count_nonzero().double())
        return elements - nonzero

    def over_ranks(self, values: Sequence[Tensor]) -> list[float]:
        """Sums scalars over the group and brings them to the host: one collective, one synchronisation."""
        joined = torch.stack(list(values))
        self.group.all_reduce_(joined)
        return [0.0] * len(values) if joined.is_meta else joined.tolist()

    def _total(self, tensors: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [
            function(tensor[start:stop])
            for shard, tensor in zip(self.shards, tensors, strict=True)
            for start, stop in self._ranges(shard)
        ]
        device = self.shards[0].values.device
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64, device=device)

    def _ranges(self, shard: Shard) -> list[tuple[int, int]]:
        """Counted ranges of a shard. Neighbours are joined over the zero padding between them, mostly into one."""
        ranges: list[tuple[int, int]] = []
        joins = False
        for piece in shard.pieces:
            counts = self.counts(piece.parameter)
            stop = piece.position + piece.stop - piece.start
            if counts and joins:
                ranges[-1] = (ranges[-1][0], stop)
            elif counts:
                ranges.append((piece.position, stop))
            joins = counts
        return ranges


def _squares(flat: Tensor) -> Tensor:
    """Sum of squares of [n], in float64 over rows of fp32 norms.

    One fp32 norm over a long tensor is off by a percent at 1e8 elements on a CPU, where a few running sums outgrow
    what is added to them.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return rows.double().square().sum() + rest.double().square()


def _logical(piece: ShardPiece) -> int:
    """Elements of a piece that are not padded vocabulary rows, which come last in the flattened parameter."""
    return max(0, min(piece.stop, piece.parameter.rectangle.numel) - piece.start)
