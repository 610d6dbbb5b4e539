"""Process group interface of one mesh axis: all-reduce, all-gather, reduce-scatter, send and receive.

A group of one rank needs no process group: its collectives are identities (LocalGroup).
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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
    """Asynchronous collective; its tensors may be read or written only after wait()."""

    def wait(self) -> Any:
        """Return once the result may be used (CUDA: once the current stream waits for it)."""


class Group(ABC):
    """Process group of one rank along a mesh axis.

    Args:
        axis: name of the axis (tp, pp, dp, mp, world), for messages and communication accounting.
        partition: the ranks of every group along the axis (a TPU collective needs all of them).
        rank: this rank in the job.

    Attributes:
        ranks: ranks of this group.
        rank: this rank's coordinate in the group.
        size: number of ranks.
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
        """Return torch.distributed's process group; None: the group has one rank."""
        return None

    @abstractmethod
    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Reduce `x` in place over the group; with `async_op` return the Work to wait for."""

    @abstractmethod
    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Write every coordinate's `x` into `out`, concatenated along dim 0. `out` may contain `x`."""

    @abstractmethod
    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Sum `x` over the group and write this coordinate's part of dim 0 into `out`."""

    @abstractmethod
    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Overwrite `x` with the tensor of `src_coordinate`."""

    @abstractmethod
    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Start sends and receives, given as (tensor, peer's coordinate), as one batch that cannot deadlock.

        Returns:
            The Work of each send, then of each receive; NCCL completes all of a batch at once, with one Work.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank of the group has called it."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every coordinate's picklable `value`, in order. Slow: for start-up and checkpoints."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every coordinate's `x`, concatenated along dim 0."""
        if self.size == 1:
            return x
        out = torch.empty((x.shape[0] * self.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self.all_gather_(out, x.contiguous())
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Return this coordinate's part of dim 0 of the sum of `x` over the group."""
        if self.size == 1:
            return x
        assert x.shape[0] % self.size == 0, f"{tuple(x.shape)} does not split over {self!r}"
        out = torch.empty((x.shape[0] // self.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        self.reduce_scatter_(out, x.contiguous())
        return out


class _Done:
    """Work that has finished."""

    def wait(self) -> None:
        return None


class LocalGroup(Group):
    """Group of one rank: every collective is the identity."""

    def __init__(self, axis: str, rank: int = 0, partition: Partition | None = None) -> None:
        super().__init__(axis, partition or ((rank,),), rank)

    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Leave `x` as it is."""
        return _Done() if async_op else None

    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Copy `x` into `out`, unless they share memory."""
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return _Done() if async_op else None

    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Copy `x` into `out`, unless they share memory."""
        return self.all_gather_(out, x, async_op)

    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Leave `x` as it is."""

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Return no work: there are no peers."""
        assert not sends and not receives, "a group of one rank has no peers"
        return []

    def barrier(self) -> None:
        """Return at once."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return this rank's value alone."""
        return [value]


class ProcessGroup(Group):
    """Group over torch.distributed (gloo or NCCL)."""

    def __init__(self, axis: str, partition: Partition, rank: int, process_group: dist.ProcessGroup) -> None:
        super().__init__(axis, partition, rank)
        self._process_group = process_group

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Return torch.distributed's process group."""
        return self._process_group

    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Reduce `x` in place over the group."""
        return dist.all_reduce(x, op=_REDUCE_OPS[op], group=self._process_group, async_op=async_op)

    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Write every coordinate's `x` into `out`."""
        return _all_gather(out, x, group=self._process_group, async_op=async_op)

    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Sum `x` and write this coordinate's part into `out`."""
        return _reduce_scatter(out, x, group=self._process_group, async_op=async_op)

    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Overwrite `x` with the tensor of `src_coordinate`."""
        dist.broadcast(x, src=self.ranks[src_coordinate], group=self._process_group)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Start sends and receives as one batch."""
        batch = [dist.P2POp(dist.isend, x, self.ranks[peer], self._process_group) for x, peer in sends]
        batch += [dist.P2POp(dist.irecv, x, self.ranks[peer], self._process_group) for x, peer in receives]
        works = dist.batch_isend_irecv(batch) if batch else []
        return works * len(batch) if len(works) == 1 else works

    def barrier(self) -> None:
        """Return once every rank of the group has called it."""
        dist.barrier(group=self._process_group)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every coordinate's `value`, in order."""
        values: list[Any] = [None] * self.size
        # At start-up ranks wait here for the slowest rank, and must still handle signals.
        run_interruptibly(lambda: dist.all_gather_object(values, value, group=self._process_group))
        return values


@dataclass(frozen=True)
class GroupOptions:
    """Options of new process groups.

    Attributes:
        backend: torch.distributed's backend of the group; None: the world's.
        timeout: of the group's collectives; None: torch's default.
        transport: options of the transport (ProcessGroupNCCL.Options); None: its defaults.
        splits: all groups of an axis are created by one split of the world's communicator. Otherwise all ranks take
            part in the creation of every group, one after the other: 200 of them for 256 ranks at tp 8, pp 4.
    """

    backend: str | None = None
    timeout: datetime.timedelta | None = None
    transport: Any = None
    splits: bool = False


def new_process_group(
    axis: str,
    partition: Partition,
    rank: int,
    options: GroupOptions = GroupOptions(),
) -> Group:
    """Create all groups along an axis (a collective call: all ranks, same order) and return this rank's group.

    Every axis has communicators of its own, also one that spans all ranks: collectives of one communicator run in
    order, and the gathers of parameters along dp would hold up whatever else all ranks agree on.

    Args:
        axis: the mesh axis; "world" is the process group of all ranks.
        partition: ranks of all groups along the axis; each rank is in one group.
        rank: this rank in the job.
        options: of the groups.
    """
    if all(len(row) == 1 for row in partition):
        return LocalGroup(axis, rank, partition)
    if axis == "world" and dist.group.WORLD is not None:
        return ProcessGroup(axis, partition, rank, dist.group.WORLD)
    rows = [list(row) for row in partition if len(row) > 1]
    handle = run_interruptibly(partial(_create, axis, rows, rank, options))
    if any(rank in row for row in rows):
        return ProcessGroup(axis, partition, rank, handle)
    return LocalGroup(axis, rank, partition)


def _create(axis: str, rows: list[list[int]], rank: int, options: GroupOptions) -> Any:
    """Create a group for each row; return this rank's."""
    world = dist.group.WORLD
    if world is not None and world.bound_device_id is not None:
        torch.cuda.set_device(world.bound_device_id)  # the current device is per thread
    common: dict[str, Any] = {"timeout": options.timeout, "pg_options": options.transport, "group_desc": axis}
    if options.splits:
        return dist.split_group(split_ranks=rows, backend=f"cuda:{options.backend}", **common)
    created = [dist.new_group(row, backend=options.backend, **common) for row in rows]
    return next((group for group, row in zip(created, rows, strict=True) if rank in row), None)
