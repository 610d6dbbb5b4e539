"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): second moments factored over a whole matrix, not its shards.

The formulas are those of fairseq's and transformers' Adafactor. A rank may hold a part of a matrix only, split over tp
and, under ZeRO-1, over dp: sums over rows, columns and elements are completed over these groups. Row and column moments
are small, so every replica holds those of its complete tensor-parallel shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.optim.update_rule import CHUNK, PieceState, UpdateRule, prepare, states_of_shards
from megatron_lite.parallel.buffers import Shard, ShardPiece
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameters import NamedParameter
from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.rectangle import Rectangle, rectangles_of_range


@dataclass(frozen=True, eq=False)
class _Block:
    """Rectangle of a parameter's local tensor on this rank: views of main parameter, gradient and first moment."""

    rectangle: Rectangle
    value: Tensor
    gradient: Tensor
    first: Tensor | None


@dataclass(eq=False)
class _Parameter:
    """Parameter with this rank's blocks and moments.

    Attributes:
        row: [..., r] mean squares of the rows of a matrix [..., r, c]; None: no matrix.
        column: [..., c] mean squares of its columns.
        vectors: second moments of the blocks of a bias or norm, which are not factored.
    """

    named: NamedParameter
    decay: bool
    blocks: list[_Block] = field(default_factory=list)
    row: Tensor | None = None
    column: Tensor | None = None
    vectors: list[Tensor] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Return the elements of the global tensor."""
        return prod(self.named.global_shape)

    @property
    def tp_place(self) -> int | None:
        """Return the dim split over tp, counted from the end: -1 columns, -2 rows; None: none."""
        tp_dim = self.named.tp_dim
        return None if tp_dim is None else tp_dim - len(self.named.global_shape)


class Adafactor(UpdateRule):
    """Adafactor over flat shards, in four passes with two reductions of rows, columns and scalars.

    Args:
        config: hyperparameters.
        shards: main parameters.
        parameters: all of this rank that are trained, in an order that is the same on all replicas.
        mesh: this rank's groups.
        sharded: whether the shards are those of ZeRO-1.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        shards: Sequence[Shard],
        parameters: Sequence[NamedParameter],
        mesh: Mesh,
        *,
        sharded: bool,
    ) -> None:
        self._config = config
        self._shards = tuple(shards)
        self._mesh, self._sharded = mesh, sharded
        device = mesh.backend.device
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        firsts = [None if config.adafactor_beta1 is None else torch.zeros_like(shard.values) for shard in shards]
        self._firsts = [first for first in firsts if first is not None]
        self._parameters = {id(named): _Parameter(named, named.param.dim() > 1) for named in parameters}
        self._seconds: list[PieceState] = []
        for entry in self._parameters.values():
            if entry.named.param.dim() > 1:
                *lead, rows, columns = entry.named.rectangle.shape
                entry.row = torch.zeros(*lead, rows, dtype=torch.float32, device=device)
                entry.column = torch.zeros(*lead, columns, dtype=torch.float32, device=device)
        for shard, first in zip(shards, firsts, strict=True):
            for piece in shard.pieces:
                self._add(self._parameters[id(piece.parameter)], shard, piece, first)

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters; a collective call over tp and, under ZeRO-1, dp."""
        config, entries = self._config, list(self._parameters.values())
        for shard in self._shards:
            prepare(shard.gradients, divisor, applies)
        applied = applies.float()
        # The paper's beta2 of step t is 1 - t^-0.8 (section 7.2).
        share = ((self._steps + 1.0).pow(-config.adafactor_decay_rate) * applied).float()
        sums, splits = self._sums_of_squares(entries)
        totals = iter(self._over_ranks(sums, splits))
        rates = []
        for entry in entries:
            if entry.row is not None and entry.column is not None:
                *_, rows, columns = entry.named.global_shape
                entry.row.lerp_((next(totals) / columns + config.adafactor_eps1).float(), share)
                entry.column.lerp_((next(totals) / rows + config.adafactor_eps1).float(), share)
            scale: Tensor | float = 1.0
            if config.adafactor_scale_parameter:
                scale = (next(totals) / entry.numel).sqrt().clamp(min=config.adafactor_eps2)
            rates.append(scale * (lr * entry.named.lr_factor))
        updates = self._updates(entries, share)
        splits = [entry.tp_place is not None for entry in entries]
        for entry, rate, total in zip(entries, rates, self._over_ranks(updates, splits), strict=True):
            clip = ((total / entry.numel).sqrt() / config.adafactor_clip_threshold).clamp(min=1.0)
            kept = 1.0 - rate * (weight_decay if entry.decay else 0.0) * applied
            self._apply(entry, (rate / clip).float(), kept, applied)
        self._steps.add_(applied)

    def states(self) -> list[PieceState]:
        """Return second moments of vectors, and first moments."""
        firsts = [{"exp_avg": first} for first in self._firsts]
        return self._seconds + (states_of_shards(self._shards, firsts) if firsts else [])

    @property
    def nbytes(self) -> int:
        """Return the bytes of all moments."""
        vectors = [vector for named in self._parameters.values() for vector in (named.row, named.column)]
        tensors = [*self._firsts, *(state.tensor for state in self._seconds), *vectors]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def vectors(self) -> list[GlobalTensor]:
        """Return the moments of rows and columns: vectors of global matrices."""
        tensors: list[GlobalTensor] = []
        for entry in self._parameters.values():
            if entry.row is not None and entry.column is not None:
                tensors += [
                    self._vector(entry, "exp_avg_sq_row", entry.row, -1),
                    self._vector(entry, "exp_avg_sq_col", entry.column, -2),
                ]
        return tensors

    def vectors_of(self, parameter: NamedParameter) -> list[Tensor]:
        """Return the moments of rows and columns of one parameter."""
        entry = self._parameters[id(parameter)]
        return [vector.view(-1) for vector in (entry.row, entry.column) if vector is not None]

    def load(self, applied: int) -> None:
        """Set the number of steps, which beta2 depends on."""
        self._steps.fill_(applied)

    def _add(self, entry: _Parameter, shard: Shard, piece: ShardPiece, first: Tensor | None) -> None:
        """Add a piece to its parameter, cut into rectangles of at most CHUNK elements or one row."""
        shape = entry.named.rectangle.shape if entry.row is not None else (entry.named.param.numel(),)
        second = None
        if entry.row is None:
            second = torch.zeros(piece.stop - piece.start, dtype=torch.float32, device=shard.values.device)
            self._seconds.append(PieceState("exp_avg_sq", piece, second))
        # Padded vocabulary rows come last in the flattened parameter, and have no moments.
        start, stop = min(piece.start, prod(shape)), min(piece.stop, prod(shape))
        step = max(CHUNK, shape[-1]) // shape[-1] * shape[-1] if len(shape) > 1 else CHUNK
        for begin in range(start - start % step, stop, step):
            for rectangle in rectangles_of_range(shape, max(start, begin), min(stop, begin + step)):
                offset = piece.position + _flat_index(rectangle, shape) - piece.start
                place = slice(offset, offset + rectangle.numel)
                views = [
                    None if flat is None else flat[place].view(rectangle.shape)
                    for flat in (shard.values, shard.gradients, first)
                ]
                assert views[0] is not None and views[1] is not None
                entry.blocks.append(_Block(rectangle, views[0], views[1], views[2]))
                if second is not None:
                    begins = rectangle.offset[0] - piece.start
                    entry.vectors.append(second[begins : begins + rectangle.numel])

    def _sums_of_squares(self, entries: Sequence[_Parameter]) -> tuple[list[Tensor], list[bool]]:
        """Return this rank's sums, in float64: for each matrix the squared gradients of rows and columns, for each
        parameter its own squares; and whether each sum continues over tp."""
        sums: list[Tensor] = []
        splits: list[bool] = []
        for entry in entries:
            if entry.row is not None and entry.column is not None:
                row, column = entry.row.double().zero_(), entry.column.double().zero_()
                for block in entry.blocks:
                    squares = block.gradient.square()
                    narrow(row, _without(block.rectangle, -1)).add_(squares.sum(-1, dtype=torch.float64))
                    narrow(column, _without(block.rectangle, -2)).add_(squares.sum(-2, dtype=torch.float64))
                sums += [row, column]
                splits += [entry.tp_place == -1, entry.tp_place == -2]
            if self._config.adafactor_scale_parameter:
                sums.append(self._squares(block.value for block in entry.blocks))
                splits.append(entry.tp_place is not None)
        return sums, splits

    def _updates(self, entries: Sequence[_Parameter], share: Tensor) -> list[Tensor]:
        """Divide gradients by the roots of second moments, in place; return this rank's sum of squares of each."""
        sums = []
        for entry in entries:
            if entry.row is not None and entry.column is not None:
                # Both means are that of all elements; only the moments of complete rows or columns are all here.
                complete = entry.column if entry.tp_place == -2 else entry.row
                row = (entry.row / complete.mean(-1, keepdim=True)).rsqrt_()
                column = entry.column.rsqrt()
                for block in entry.blocks:
                    block.gradient.mul_(narrow(row, _without(block.rectangle, -1)).unsqueeze(-1))
                    block.gradient.mul_(narrow(column, _without(block.rectangle, -2)).unsqueeze(-2))
            for block, second in zip(entry.blocks, entry.vectors, strict=False):
                second.lerp_(block.gradient.square() + self._config.adafactor_eps1, share)
                block.gradient.mul_(second.rsqrt())
            sums.append(self._squares(block.gradient for block in entry.blocks))
        return sums

    def _apply(self, entry: _Parameter, rate: Tensor, kept: Tensor | float, applied: Tensor) -> None:
        """Add the update of one parameter to its blocks.

        Args:
            entry: with the update in place of the gradient.
            rate: factor of the update.
            kept: factor of the parameter by weight decay.
            applied: 1, or 0 for a step that is not applied.
        """
        beta1 = self._config.adafactor_beta1
        for block in entry.blocks:
            # Before the first step that is applied, moments are zero and the update is not finite.
            update = torch.where(applied > 0, block.gradient.mul_(rate), 0.0)
            if block.first is not None and beta1 is not None:
                update = block.first.lerp_(update, applied * (1.0 - beta1)) * applied
            block.value.mul_(kept).sub_(update)

    def _squares(self, tensors: Iterable[Tensor]) -> Tensor:
        parts = [tensor.square().sum(dtype=torch.float64) for tensor in tensors]
        return torch.stack(parts).sum() if parts else self._steps.new_zeros(())

    def _over_ranks(self, sums: Sequence[Tensor], splits: Sequence[bool]) -> list[Tensor]:
        """Return sums completed over the ranks that hold parts of the same parameter; at most two collectives.

        Args:
            sums: of this rank.
            splits: whether the terms of each are split over tp.
        """
        order = sorted(range(len(sums)), key=lambda number: not splits[number])
        sizes = [sums[number].numel() for number in order]
        if not sums:  # all parameters of the stage are frozen
            return []
        joined = torch.cat([sums[number].flatten() for number in order])
        if self._sharded:
            self._mesh.replicas.all_reduce_(joined)
        if over_tp := sum(sums[number].numel() for number in order if splits[number]):
            self._mesh.tp.all_reduce_(joined[:over_tp])
        found = dict(zip(order, joined.split(sizes), strict=True))
        return [found[number].view(sums[number].shape) for number in range(len(sums))]

    def _vector(self, entry: _Parameter, name: str, tensor: Tensor, dropped: int) -> GlobalTensor:
        """Return the moment of rows or columns, which lacks the dim `dropped` of the matrix."""
        named, mesh = entry.named, self._mesh
        place = _without(named.rectangle, dropped)
        shape = list(named.global_shape)
        shape.pop(dropped)
        split = entry.tp_place not in (None, dropped)
        counts = named.owned and (split or mesh.tp.rank == 0)
        return GlobalTensor(
            f"optimizer.{name}.{named.name}",
            tuple(shape),
            tensor.dtype,
            [Piece(place.offset, tensor)] if tensor.numel() else [],
            counts and mesh.replicas.rank == 0,
            (mesh.replicas.rank, mesh.replicas.size) if counts else (0, 1),
        )


def _without(rectangle: Rectangle, dim: int) -> Rectangle:
    """Return a rectangle without one dim, counted from the end."""
    offset, shape = list(rectangle.offset), list(rectangle.shape)
    offset.pop(dim)
    shape.pop(dim)
    return Rectangle(tuple(offset), tuple(shape))


def _flat_index(rectangle: Rectangle, shape: Sequence[int]) -> int:
    """Return the index of a rectangle's first element in the flattened tensor."""
    index = 0
    for offset, length in zip(rectangle.offset, shape, strict=True):
        index = index * length + offset
    return index
