"""Communication accounting: a process-group wrapper that records the bytes of every collective.

Bytes sent are those of the algorithms that reach the lower bound (ring; Patarasu & Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations"), so that counts can be compared with closed formulas. A transport
may choose another algorithm and send more.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lite.backend.group import Group, ReduceOp, Work

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", "receive", "barrier", "object"]


@dataclass(frozen=True)
class Transfer:
    """One collective call or P2P message of this rank.

    Attributes:
        axis: of the group.
        kind: of the call.
        elements: of the full tensor: reduced, broadcast, sent or received, after gathering, or before scattering; for
            an object, its pickled bytes.
        dtype: of the elements; None: bytes.
        ranks: of the group.
        peer: for send and receive, the coordinate of the other rank.
    """

    axis: str
    kind: Kind
    elements: int
    dtype: torch.dtype | None
    ranks: tuple[int, ...]
    peer: int | None = None

    @property
    def size(self) -> int:
        """Return the size of the full tensor in bytes."""
        return self.elements * (1 if self.dtype is None else self.dtype.itemsize)

    @property
    def sent(self) -> int:
        """Return the bytes that this rank sends, rounded down.

        Over d ranks: all-reduce 2 (d - 1) / d of the tensor, all-gather and reduce-scatter (d - 1) / d of it, an object
        d - 1 times; a broadcast passes through every rank once, as in a chain.
        """
        size, ranks = self.size, len(self.ranks)
        if self.kind == "all_reduce":
            return 2 * size * (ranks - 1) // ranks
        if self.kind in ("all_gather", "reduce_scatter"):
            return size * (ranks - 1) // ranks
        if self.kind == "object":
            return size * (ranks - 1)
        return 0 if self.kind in ("receive", "barrier") else size


@dataclass
class Total:
    """Sum of the calls of one kind along one axis.

    Attributes:
        calls: number of calls.
        size: bytes of their full tensors.
        sent: bytes that this rank sent.
    """

    calls: int = 0
    size: int = 0
    sent: int = 0


def totals(transfers: Iterable[Transfer]) -> dict[tuple[str, Kind], Total]:
    """Return the sums of transfers by axis and kind."""
    found: dict[tuple[str, Kind], Total] = defaultdict(Total)
    for transfer in transfers:
        total = found[transfer.axis, transfer.kind]
        total.calls += 1
        total.size += transfer.size
        total.sent += transfer.sent
    return dict(found)


def counted(group: Group, traffic: list[Transfer]) -> Group:
    """Return the group with its calls recorded in `traffic`; a group of one rank is returned as it is."""
    return CountedGroup(group, traffic) if group.size > 1 else group


class CountedGroup(Group):
    """Group that records each call and passes it on to another group.

    Args:
        inner: the group that communicates.
        traffic: the record, to which calls are appended; may be shared with other groups.
    """

    def __init__(self, inner: Group, traffic: list[Transfer]) -> None:
        super().__init__(inner.axis, inner.partition, inner.ranks[inner.rank])
        self._inner = inner
        self._traffic = traffic

    @property
    def process_group(self) -> Any:
        """Return the inner group's process group; calls on it are not recorded."""
        return self._inner.process_group

    def all_reduce_(self, x: Tensor, op: ReduceOp = "sum", async_op: bool = False) -> Work | None:
        """Record `x`."""
        self._record("all_reduce", x)
        return self._inner.all_reduce_(x, op, async_op)

    def all_gather_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Record `out`."""
        self._record("all_gather", out)
        return self._inner.all_gather_(out, x, async_op)

    def reduce_scatter_(self, out: Tensor, x: Tensor, async_op: bool = False) -> Work | None:
        """Record `x`."""
        self._record("reduce_scatter", x)
        return self._inner.reduce_scatter_(out, x, async_op)

    def broadcast_(self, x: Tensor, src_coordinate: int = 0) -> None:
        """Record `x`."""
        self._record("broadcast", x)
        self._inner.broadcast_(x, src_coordinate)

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Sequence[Work]:
        """Record each message."""
        for tensor, peer in sends:
            self._record("send", tensor, peer)
        for tensor, peer in receives:
            self._record("receive", tensor, peer)
        return self._inner.exchange(sends, receives)

    def barrier(self) -> None:
        """Record the call."""
        self._traffic.append(Transfer(self.axis, "barrier", 0, None, self.ranks))
        self._inner.barrier()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Record the size of the pickled value."""
        self._traffic.append(Transfer(self.axis, "object", len(pickle.dumps(value)), None, self.ranks))
        return self._inner.all_gather_object(value)

    def _record(self, kind: Kind, tensor: Tensor, peer: int | None = None) -> None:
        self._traffic.append(Transfer(self.axis, kind, tensor.numel(), tensor.dtype, self.ranks, peer))
