"""Node counts that the layout of a run allows, each with run time, GPU hours and idle data-parallel replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_lite.config.run import RunConfig
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.job import run_stages
from megatron_lite.planner.memory import fullest_bytes
from megatron_lite.schedules.length import ramp_stages
from megatron_lite.schedules.microbatches import total_microbatches

LONG = 64
"""Pipeline ranks up to which the memory of each node count is computed."""


@dataclass(frozen=True)
class NodeCount:
    """One number of nodes.

    Attributes:
        dp: data-parallel replicas.
        seconds: of training.
        device_hours: of training.
        even: whether every replica has the same number of micro-batches in every stage of the ramp-up.
        idle: share of the device time without micro-batches, over the run.
        memory: bytes on the fullest rank; None: not computed for long pipelines, where it takes seconds.
    """

    nodes: int
    devices: int
    dp: int
    seconds: float
    device_hours: float
    even: bool
    idle: float
    memory: int | None


def node_counts(config: RunConfig, machine: Hardware, even: Sequence[int]) -> list[NodeCount]:
    """Return a quarter to four times the given number of nodes, and the largest of `even` (even_nodes).

    Only numbers whose ranks are whole replicas of the model are in the list.
    """
    given = max(1, config.parallel.world_size // machine.per_node)
    candidates = {max(1, given // 4), max(1, given // 2), given, 2 * given, 4 * given, *even[-1:]}
    return [node_count(config, machine, nodes) for nodes in sorted(candidates) if is_feasible(config, machine, nodes)]


def node_count(config: RunConfig, machine: Hardware, nodes: int) -> NodeCount:
    """Return the time of a run on `nodes` nodes."""
    devices = nodes * machine.per_node
    changed = replace(config, parallel=replace(config.parallel, world_size=devices))
    stages = list(run_stages(changed, machine))
    seconds = sum(stage.seconds for stage in stages)
    return NodeCount(
        nodes=nodes,
        devices=devices,
        dp=devices // config.parallel.replica_size,
        seconds=seconds,
        device_hours=devices * seconds / 3600.0,
        even=all(stage.idle == 0.0 for stage in stages),
        idle=sum(stage.idle * stage.seconds for stage in stages) / seconds if seconds else 0.0,
        memory=fullest_bytes(changed) if config.parallel.pp <= LONG else None,
    )


def even_nodes(config: RunConfig, machine: Hardware, most: int) -> list[int]:
    """Return the feasible numbers of nodes up to `most` whose replicas divide the micro-batches of every stage."""
    micro = config.batch.micro_batch_size
    counts = {total_microbatches(stage.global_batch, micro) for stage in ramp_stages(config)}
    return [
        nodes
        for nodes in range(1, most + 1)
        if is_feasible(config, machine, nodes)
        and all(count % (nodes * machine.per_node // config.parallel.replica_size) == 0 for count in counts)
    ]


def is_feasible(config: RunConfig, machine: Hardware, nodes: int) -> bool:
    """Return whether `nodes` nodes hold one or more whole replicas of the model."""
    replicas, rest = divmod(nodes * machine.per_node, config.parallel.replica_size)
    return not rest and replicas > 0
