"""The mesh as a value: this rank's group along every axis. Passed on, never global."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.config.layout import partitions
from megatron_lite.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """One group per axis; each group's `rank` is this rank's coordinate and its `size` the axis's."""

    backend: Backend
    tp: Group
    pp: Group
    dp: Group
    mp: Group
    """The tp x pp ranks that together hold one replica of the model."""
    embedding: Group
    """The first and the last rank of the pipeline, who hold copies of a tied embedding unless one has both ends."""
    world: Group

    def __str__(self) -> str:
        return f"rank {self.world.rank} (dp {self.dp.rank}, pp {self.pp.rank}, tp {self.tp.rank})"


def build_mesh(backend: Backend, parallel: ParallelConfig) -> Mesh:
    """Makes the groups of all axes; a collective call where there are several ranks.

    Args:
        backend: this rank's machine.
        parallel: the sizes of the axes; their product is the backend's world.
    """
    assert parallel.tp * parallel.pp * parallel.dp == backend.world_size, (parallel, backend.world_size)

    def group(axis: str) -> Group:
        return backend.new_group(axis, partitions(axis, parallel))

    return Mesh(
        backend,
        tp=group("tp"),
        pp=group("pp"),
        dp=group("dp"),
        mp=group("mp"),
        embedding=group("embedding"),
        world=group("world"),
    )
