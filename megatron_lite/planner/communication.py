"""Communication time: seconds of collectives and messages for each mesh axis, over the links of a node or the network.

Collectives are rings (Thakur et al. 2005): of n ranks, an all-gather or reduce-scatter sends (n-1)/n of the complete
tensor through each rank, an all-reduce twice that. A ring within a node runs at the link's rate. A ring over several
nodes crosses the network with the ports of all its ranks in a node, and is no faster than the link.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from megatron_lite.planner.hardware import Hardware


@dataclass(frozen=True)
class Axis:
    """Group of ranks along one axis of the mesh.

    Attributes:
        size: ranks of the group.
        stride: distance of two neighbours' rank numbers.
        machine: where they run; consecutive ranks share a node.
    """

    size: int
    stride: int
    machine: Hardware

    @property
    def in_node(self) -> int:
        """Number of the group's ranks that share a node."""
        return max(1, min(self.size, self.machine.per_node // self.stride))

    @property
    def crosses_nodes(self) -> bool:
        """True if the group has ranks on several nodes."""
        return self.in_node < self.size

    @property
    def rate(self) -> float:
        """Bytes per second through each rank of a ring."""
        if not self.crosses_nodes:
            return self.machine.link_rate
        across = self.machine.network_rate * self.in_node
        return across if self.in_node == 1 else min(self.machine.link_rate, across)

    def all_gather(self, size: float) -> float:
        """Return the seconds of an all-gather of `size` bytes in all, or of a reduce-scatter."""
        if self.size == 1:
            return 0.0
        return size * (self.size - 1) / self.size / self.rate + self._latency

    def all_reduce(self, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes."""
        return 2.0 * self.all_gather(size)

    def message(self, size: float) -> float:
        """Return the seconds of a message of `size` bytes to the next rank of the group."""
        if self.size == 1:
            return 0.0
        # Neighbours at the end of a node are on two nodes, and a pipeline waits for its slowest message.
        rate = self.machine.network_rate if self.crosses_nodes else self.machine.link_rate
        return size / rate + self.machine.efficiency.message_seconds

    @property
    def _latency(self) -> float:
        return self.machine.efficiency.message_seconds * (1.0 + log2(self.size) / 2)
