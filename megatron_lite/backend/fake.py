"""Fake backend: meta tensors and stub process groups; one process acts as any rank of any world size.

One backend simulates one rank. Its groups do not communicate, but refuse what a real transport would refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_lite.backend.accounting import Transfer, counted
from megatron_lite.backend.base import Backend, Capabilities, Reading
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.group import Group, LocalGroup, Partition, ReduceOp, Work
from megatron_lite.config.runtime import LOSS_CHUNK
from megatron_lite.errors import TrainingError, report_bug


class FakeBackend(Backend):
    """Backend that simulates one rank of any world size on the meta device.

    Args:
        rank: the simulated rank.
        world_size: ranks of the job.

    Attributes:
        traffic: record of every collective and P2P message of the rank.
    """

    name = "fake"
    loss_chunk = LOSS_CHUNK

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(Launch(rank=rank, world_size=world_size))
        self.device = torch.device("meta")
        self.traffic: list[Transfer] = []

    def seed(self, value: int) -> None:
        """Do nothing: meta tensors draw no values."""

    def synchronize(self) -> None:
        """Do nothing: no operation runs."""

    def memory_stats(self) -> dict[str, int]:
        """Return zeros: meta tensors take no memory."""
        return {"allocated": 0, "max_allocated": 0, "reserved": 0, "max_reserved": 0}

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return None: no arithmetic is done."""
        return None

    def device_name(self) -> str:
        """Return a description of the missing device."""
        return "no device (rehearsal)"

    def capabilities(self) -> Capabilities:
        """Return the capabilities: without compilation and fused kernels, which need a device."""
        return Capabilities(compile=False, fused_adam=False)

    def read_later(self, values: Tensor) -> Reading:
        """Return ones: meta tensors have no values, and a finite flag of 0 would mean an overflow."""
        return lambda: [1.0] * values.numel()

    def generator(self, seed: int) -> torch.Generator | None:
        """Return None: meta tensors draw no values."""
        return None

    def new_group(self, axis: str, partition: Partition) -> Group:
        """Return this rank's stub group, whose calls are recorded in `traffic`."""
        row = next(row for row in partition if self.rank in row)
        if len(row) == 1:
            return LocalGroup(axis, self.rank, partition)
        return counted(StubGroup(axis, partition, self.rank), self.traffic)


class _Done:
    """Work that has finished."""

    def wait(self) -> None:
        return None


class StubGroup(Group):
    """Group of one simulated rank: collectives check their arguments and leave tensors unchanged."""

    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Check `x`."""
        self._check("all-reduces", x)
        return _Done() if async_op else None

    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Check that `out` has room for every coordinate's `x`."""
        self._check("all-gathers", out, x)
        self._check_parts("all-gathers", out, x)
        return _Done() if async_op else None

    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Check that `x` splits into parts shaped as `out`."""
        self._check("reduce-scatters", out, x)
        self._check_parts("reduce-scatters", x, out)
        return _Done() if async_op else None

    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Check `x` and the source."""
        self._check("broadcasts", x)
        self._check_peer(src_coordinate)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Check every message and its peer."""
        for tensor, peer in (*sends, *receives):
            self._check("sends or receives", tensor)
            self._check_peer(peer)
            if peer == self.rank:
                raise self._error("sends a message to itself")
        return [_Done() for _ in (*sends, *receives)]

    def barrier(self) -> None:
        """Return at once."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return this rank's value in the place of every rank's."""
        return [value] * self.size

    def _check(self, verb: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise self._error(f"{verb} a tensor of shape {tuple(tensor.shape)} that is not contiguous")
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise self._error(f"{verb} between {' and '.join(str(tensor.dtype) for tensor in tensors)}")

    def _check_parts(self, verb: str, whole: Tensor, part: Tensor) -> None:
        if whole.numel() != part.numel() * self.size:
            raise self._error(f"{verb} {self.size} parts of {part.numel()} elements and a whole of {whole.numel()}")

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise self._error(f"names a peer at coordinate {peer} of {self.size}")

    def _error(self, call: str) -> TrainingError:
        return TrainingError(
            f"Invalid collective: coordinate {self.rank} of a {self.axis} group {call}",
            fix=report_bug("Nothing was written"),
        )
