"""Process groups and collectives: the ranks along one axis of the mesh.

A group of one rank needs no process group: its collectives are identities (LocalGroup).
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.backend.interruptible import run_interruptibly

Partition = tuple[tuple[int, ...], ...]
ReduceOp = Literal["sum", "max", "min"]

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renamed these two and warns at the old names; 2.9 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """A collective under way; its tensors may be touched only after wait()."""

    def wait(self) -> Any:
        """Returns once the result may be used (CUDA: once the current stream is made to wait for it)."""


class Group(ABC):
    """This rank's row of a partition of all ranks, and its coordinate in it.

    Args:
        axis: the mesh axis it runs along (tp, pp, dp, mp, world): for messages and for counting bytes.
        partition: every row of the axis, not only this rank's (a TPU collective must name them all).
        rank: this rank in the whole job.
    """

    def __init__(self, axis: str, partition: Partition, rank: int) -> None:
        self.axis = axis
        self.partition = partition
        self.ranks: tuple[int, ...] = next(row for row in partition if rank in row)
        self.rank: int = self.ranks.index(rank)
        self.size: int = len(self.ranks)

    def __repr__(self) -> str:
        return f"Group({self.axis} {self.rank}/{self.size})"

    @property
    def process_group(self) -> Any:
        """What torch.distributed.checkpoint wants; None where the group is only this rank."""
        return None

    @abstractmethod
    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Reduces `x` in place over the group; `async_op` returns the Work to wait for."""

    @abstractmethod
    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Writes every coordinate's `x` into `out`, one after the other along dim 0. `out` may contain `x`."""

    @abstractmethod
    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Sums `x` over the group and writes this coordinate's part (of dim 0) into `out`."""

    @abstractmethod
    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Overwrites `x` with the one of `src_coordinate`."""

    @abstractmethod
    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Starts sends and receives, given as (tensor, peer's coordinate), as one batch that cannot deadlock."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns once every rank of the group has come here."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Every coordinate's picklable `value`, in order. Slow: for start-up and checkpoints."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every coordinate's `x`, concatenated along dim 0."""
        if self.size == 1:
            return x
        out = torch.empty((x.shape[0] * self.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self.all_gather_(out, x.contiguous())
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum of `x` over the group, of which each coordinate gets its part of dim 0."""
        if self.size == 1:
            return x
        assert x.shape[0] % self.size == 0, f"{tuple(x.shape)} does not split over {self!r}"
        out = torch.empty((x.shape[0] // self.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self.reduce_scatter_(out, x.contiguous())
        return out

    def send(self, x: Tensor, coordinate: int) -> Work:
        """Starts sending `x` (contiguous) to a peer of the group."""
        return self.exchange([(x, coordinate)], [])[0]

    def recv_(self, x: Tensor, coordinate: int) -> Work:
        """Starts receiving into `x` (contiguous) from a peer of the group."""
        return self.exchange([], [(x, coordinate)])[0]


class _Done:
    """The Work of a collective that had nothing to do."""

    def wait(self) -> None:
        return None


class LocalGroup(Group):
    """A group of this rank alone: every collective is the identity."""

    def __init__(self, axis: str, rank: int = 0, partition: Partition | None = None) -> None:
        super().__init__(axis, partition or ((rank,),), rank)

    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Leaves `x` as it is."""
        return _Done() if async_op else None

    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Copies `x`, unless it already lies in `out`."""
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return _Done() if async_op else None

    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Copies `x`, unless it already lies in `out`."""
        return self.all_gather_(out, x, async_op)

    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Leaves `x` as it is."""

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Nobody is there to talk to."""
        assert not sends and not receives, "a group of one rank has no peers"
        return []

    def barrier(self) -> None:
        """Returns at once."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Only this rank's."""
        return [value]


class ProcessGroup(Group):
    """A group over torch.distributed (gloo, NCCL, or the fake one that rehearsals use)."""

    def __init__(self, axis: str, partition: Partition, rank: int, process_group: dist.ProcessGroup) -> None:
        super().__init__(axis, partition, rank)
        self._process_group = process_group

    @property
    def process_group(self) -> dist.ProcessGroup:
        """torch.distributed's own handle."""
        return self._process_group

    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Reduces `x` in place over the group."""
        return dist.all_reduce(x, op=_REDUCE_OPS[op], group=self._process_group, async_op=async_op)

    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Writes every coordinate's `x` into `out`."""
        return _all_gather(out, x, group=self._process_group, async_op=async_op)

    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Sums `x` and writes this coordinate's part into `out`."""
        return _reduce_scatter(out, x, group=self._process_group, async_op=async_op)

    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Overwrites `x` with the one of `src_coordinate`."""
        dist.broadcast(x, src=self.ranks[src_coordinate], group=self._process_group)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Starts sends and receives as one batch."""
        batch = [dist.P2POp(dist.isend, x, self.ranks[peer], self._process_group) for x, peer in sends]
        batch += [dist.P2POp(dist.irecv, x, self.ranks[peer], self._process_group) for x, peer in receives]
        return dist.batch_isend_irecv(batch) if batch else []

    def barrier(self) -> None:
        """Returns once every rank of the group has come here."""
        dist.barrier(group=self._process_group)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every coordinate's `value`, in order."""
        values: list[Any] = [None] * self.size
        # Ranks wait here for the slowest at start-up, and must stay open to signals.
        run_interruptibly(lambda: dist.all_gather_object(values, value, group=self._process_group))
        return values


def new_process_group(
    axis: str,
    partition: Partition,
    rank: int,
    backend: str | None = None,
    timeout: datetime.timedelta | None = None,
) -> Group:
    """Create the groups of every row (a collective call: all ranks, same order) and return this rank's.

    Args:
        axis: the mesh axis.
        partition: all rows of the axis; together they hold every rank once.
        rank: this rank in the whole job.
        backend: torch.distributed's backend of the group; None: the world's.
        timeout: of the group's collectives; None: torch's default.
    """
    if all(len(row) == 1 for row in partition):
        return LocalGroup(axis, rank, partition)
    if len(partition) == 1 and dist.group.WORLD is not None:
        return ProcessGroup(axis, partition, rank, dist.group.WORLD)
    mine: Group | None = None
    for row in partition:
        handle = run_interruptibly(partial(_new_group, row, backend, timeout)) if len(row) > 1 else None
        if rank in row:
            mine = LocalGroup(axis, rank, partition) if handle is None else ProcessGroup(axis, partition, rank, handle)
    assert mine is not None, f"rank {rank} is in no row of {axis}"
    return mine


def _new_group(row: Sequence[int], backend: str | None, timeout: datetime.timedelta | None) -> Any:
    world = dist.group.WORLD
    if world is not None and world.bound_device_id is not None:
        torch.cuda.set_device(world.bound_device_id)  # of this thread
    return dist.new_group(list(row), timeout=timeout, backend=backend)
