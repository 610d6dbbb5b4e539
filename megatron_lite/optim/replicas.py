"""Replica comparison: bit hashes of replicated parameters on all ranks, and overwriting of ranks that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from megatron_lite.config.layout import coordinates, rank_of
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.optim.optimizer import Optimizer
from megatron_lite.parallel.bit_hash import BitHash
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.mesh import Mesh

_CHUNK = 1 << 24
"""Elements per broadcast of a repair."""


@dataclass(frozen=True)
class Mismatch:
    """A parameter, or one tensor-parallel part of it, whose replicas differ.

    Attributes:
        name: of the parameter.
        tp: coordinate of the part; None: every tp rank holds the whole parameter.
        hashes: hash by rank that holds the parameter.
    """

    name: str
    tp: int | None
    hashes: Mapping[int, int]

    @property
    def source(self) -> int:
        """Return the first rank with the most frequent hash; of equally frequent hashes, that of the lowest rank."""
        counts = Counter(self.hashes[rank] for rank in sorted(self.hashes))
        common = counts.most_common(1)[0][0]
        return min(rank for rank, found in self.hashes.items() if found == common)

    @property
    def differing(self) -> list[int]:
        """Return the ranks whose hash differs from the source's."""
        return sorted(rank for rank, found in self.hashes.items() if found != self.hashes[self.source])


class Replicas:
    """Comparison and repair of parameters that several ranks hold.

    These are: all parameters, over the data- and context-parallel ranks; parameters replicated over tp; and parameters
    of shared modules, over the pipeline stages that hold them.

    Args:
        mesh: this rank's groups.
        parallel: sizes of the mesh axes.
        buffers: this rank's parameters.
        optimizer: holds the optimizer state.
    """

    def __init__(self, mesh: Mesh, parallel: ParallelConfig, buffers: ParameterBuffers, optimizer: Optimizer) -> None:
        self._mesh = mesh
        self._parallel = parallel
        self._buffers = buffers
        self._optimizer = optimizer
        self._hash: BitHash | None = None

    def compare(self) -> list[Mismatch]:
        """Find the parameters whose replicas differ in any bit; a collective call with the same result on every rank.

        Ranks first exchange one hash for each kind of replication, and only if these differ one for each parameter.
        """
        self._buffers.finish_gather()
        mesh = self._mesh
        device = mesh.backend.device
        self._hash = self._hash or BitHash(device)
        parameters = self._buffers.parameters
        hashes = torch.stack([self._hash(parameter.param) for parameter in parameters])
        # Parameters that should be equal along each row of a partition of the ranks.
        classes = [
            (mesh.replicas.partition, list(parameters)),
            (mesh.tp.partition, [p for p in parameters if p.tp_dim is None]),
        ]
        for name, shared in self._buffers.shared.items():
            classes.append((shared.group.partition, self._buffers.members[name]))
        index = {id(parameter): number for number, parameter in enumerate(parameters)}
        totals = torch.stack([self._hash(hashes[[index[id(p)] for p in chosen]]) for _, chosen in classes])
        by_rank: list[list[int]] = mesh.world.all_gather(totals.view(1, -1)).tolist()
        if not any(
            len({by_rank[rank][column] for rank in row}) > 1
            for column, (partition, _) in enumerate(classes)
            for row in partition
        ):
            return []
        found = zip(parameters, hashes.tolist(), strict=True)
        own = {(p.name, None if p.tp_dim is None else self._mesh.tp.rank): value for p, value in found}
        holders: dict[tuple[str, int | None], dict[int, int]] = {}
        for rank, hashes_by_key in enumerate(self._mesh.world.all_gather_object(own)):
            for key, value in hashes_by_key.items():
                holders.setdefault(key, {})[rank] = value
        return [Mismatch(*key, ranks) for key, ranks in holders.items() if len(set(ranks.values())) > 1]

    @torch.no_grad()
    def repair(self, mismatches: Sequence[Mismatch]) -> None:
        """Overwrite differing replicas and their optimizer state with the source's; a collective call.

        Where main parameters are fp32 copies, the parameters are finally rounded from them: under ZeRO-1 each main
        parameter has one holder among the replicas, so replicas that differ in the parameters become equal to it.
        """
        for mismatch in mismatches:
            self._repair(mismatch)
        self._optimizer.refresh_parameters()

    def _repair(self, mismatch: Mismatch) -> None:
        members = set(mismatch.hashes)
        values, states = list[Tensor](), list[Tensor]()
        if self._mesh.world.rank in members:
            parameter = next(entry for entry in self._buffers.parameters if entry.name == mismatch.name)
            values = [parameter.param.data.view(-1)]
            states = self._optimizer.states_of(parameter)
        self._send(mismatch.source, members, values)
        at = coordinates(mismatch.source, self._parallel)
        if not self._buffers.sharded:
            self._send(mismatch.source, members, states)
            return
        # Under ZeRO-1 a slice of the state is held by ranks with one cp and dp coordinate only.
        for cp, dp in product(range(self._parallel.cp), range(self._parallel.dp)):
            holder = {"cp": cp, "dp": dp}
            same = {rank for rank in members if holder.items() <= coordinates(rank, self._parallel).items()}
            if len(same) > 1:
                self._send(rank_of({**at, **holder}, self._parallel), same, states)

    def _send(self, source: int, members: set[int], tensors: Sequence[Tensor]) -> None:
        """Copy flat tensors from `source` to the other members, by broadcasts to all ranks, since repairs are rare."""
        world = self._mesh.world
        shapes: list[tuple[int, torch.dtype]] = world.all_gather_object([(t.numel(), t.dtype) for t in tensors])[source]
        for number, (length, dtype) in enumerate(shapes):
            own = tensors[number] if world.rank in members else None
            for start in range(0, length, _CHUNK):
                stop = min(length, start + _CHUNK)
                chunk = torch.empty(stop - start, dtype=dtype, device=self._mesh.backend.device)
                if own is not None:
                    chunk.copy_(own[start:stop])
                world.broadcast_(chunk, source)
                if own is not None:
                    own[start:stop].copy_(chunk)
