"""Device mesh: named axes (tp, cp, dp, pp) with this rank's process group along each; passed as an argument."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.config.layout import AXES, describe_coordinates, partitions, subset_partition
from megatron_lite.config.parallel import ParallelConfig

_NAMES = {frozenset(("tp", "pp")): "mp", frozenset(("cp", "dp")): "dp-cp", frozenset(AXES): "world"}
"""Names of groups over several axes, for messages and counts of traffic."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Groups of this rank. A group's `rank` is this rank's coordinate on the axis, its `size` the axis's."""

    backend: Backend
    parallel: ParallelConfig
    axes: Mapping[str, Group]
    """By axis, in the order of config.layout.AXES."""
    _groups: dict[tuple[str | int, ...], Group] = field(default_factory=dict)

    @property
    def tp(self) -> Group:
        """Return the tensor-parallel group."""
        return self.axes["tp"]

    @property
    def cp(self) -> Group:
        """Return the context-parallel group."""
        return self.axes["cp"]

    @property
    def dp(self) -> Group:
        """Return the data-parallel group."""
        return self.axes["dp"]

    @property
    def pp(self) -> Group:
        """Return the pipeline-parallel group."""
        return self.axes["pp"]

    @property
    def replicas(self) -> Group:
        """Return the group of ranks that hold the same parameters: over dp, and over cp, which splits the sequence."""
        return self.dp if self.cp.size == 1 else self.group("cp", "dp")

    @property
    def world(self) -> Group:
        """Return the group of all ranks."""
        return self.group(*AXES)

    def group(self, *axes: str) -> Group:
        """Return this rank's group over several axes, created at the first call.

        Creating a group is a collective call: all ranks must ask for the same groups in the same order.
        """
        if axes not in self._groups:
            name = _NAMES.get(frozenset(axes), "-".join(axes))
            self._groups[axes] = self.backend.new_group(name, partitions(axes, self.parallel))
        return self._groups[axes]

    def subgroup(self, axis: str, places: Collection[int], name: str) -> Group:
        """Return this rank's group of the given coordinates of an axis, or of this rank alone if it has none of them.

        The first call is collective, as in group.
        """
        key: tuple[str | int, ...] = (axis, *sorted(places), name)
        if key not in self._groups:
            partition = subset_partition(partitions(axis, self.parallel), sorted(places))
            self._groups[key] = self.backend.new_group(name, partition)
        return self._groups[key]

    def __str__(self) -> str:
        at = {axis: group.rank for axis, group in self.axes.items()}
        return f"rank {self.backend.rank} ({describe_coordinates(at, self.parallel)})"


def build_mesh(backend: Backend, parallel: ParallelConfig) -> Mesh:
    """Create the groups of all axes and of the world; a collective call.

    Args:
        backend: of this rank.
        parallel: sizes of the axes; their product is the backend's world size.
    """
    assert parallel.replica_size * parallel.dp == backend.world_size, (parallel, backend.world_size)
    axes = {axis: backend.new_group(axis, partitions(axis, parallel)) for axis in AXES}
    mesh = Mesh(backend, parallel, axes)
    mesh.group(*AXES)
    return mesh
