"""Global reductions over sharded tensors: norms and zero counts, each replicated or tied element counted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.backend.group import Group
from megatron_lite.parallel.buffers import Shard
from megatron_lite.parallel.parameters import NamedParameter

_ROW = 4096


@dataclass(frozen=True)
class ElementSums:
    """Sums over parameters or gradients of the model.

    A shared parameter is counted by the stage that owns it, a parameter replicated over tp by the first tp rank.

    Args:
        shards: of this rank.
        tp_rank: this rank's coordinate along tp.
        group: the ranks whose shards together hold the model once: tp and pp, and cp and dp under ZeRO-1.
        device: of the shards, of which this rank may have none; None: the CPU.
        dtype: of the sums (Backend.sum_dtype).
    """

    shards: Sequence[Shard]
    tp_rank: int
    group: Group
    device: torch.device | None = None
    dtype: torch.dtype = torch.float64

    def is_counted(self, parameter: NamedParameter) -> bool:
        """Return whether this rank's stage and tp coordinate count (and save) the parameter."""
        return parameter.owned and (parameter.tp_dim is not None or self.tp_rank == 0)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sum of squares over this rank's share: a scalar.

        Args:
            tensors: one flat tensor for each shard.
        """
        return self._sum([squares_of(part, self.dtype) for part in self._counted_parts(tensors)], self.dtype)

    def zeros(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the number of elements equal to zero in this rank's share, without padding: a scalar."""
        pieces = [piece for shard in self.shards for piece in shard.pieces if self.is_counted(piece.parameter)]
        # Padded vocabulary rows come last in the flattened parameter.
        elements = sum(max(0, min(piece.stop, piece.parameter.rectangle.numel) - piece.start) for piece in pieces)
        nonzero = self._sum([part.count_nonzero() for part in self._counted_parts(tensors)], torch.int64)
        return (elements - nonzero).to(self.dtype)  # fp32 would round both terms

    def over_ranks(self, values: Sequence[Tensor]) -> Tensor:
        """Return scalars summed over the group, [n] on the device; one collective."""
        joined = torch.stack(list(values))
        self.group.all_reduce_(joined)
        return joined

    def _sum(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if not parts:
            return torch.zeros((), dtype=dtype, device=self.device)
        return torch.stack(list(parts)).sum()

    def _counted_parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the counted ranges of each shard's tensor, neighbours joined over the zero padding between them."""
        parts = []
        for shard, tensor in zip(self.shards, tensors, strict=True):
            ranges: list[tuple[int, int]] = []
            joins = False
            for piece in shard.pieces:
                counts = self.is_counted(piece.parameter)
                stop = piece.position + piece.stop - piece.start
                if counts and joins:
                    ranges[-1] = (ranges[-1][0], stop)
                elif counts:
                    ranges.append((piece.position, stop))
                joins = counts
            parts += [tensor[start:stop] for start, stop in ranges]
        return parts


def squares_of(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of [n], in `dtype` over rows of fp32 norms.

    One fp32 norm over a long tensor is off by a percent at 1e8 elements on a CPU: the few running sums become so large
    that small terms are rounded away.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return rows.to(dtype).square().sum() + rest.to(dtype).square()
