"""Slurm partitions, as sinfo reports them, and the checks of a job against them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.backend.nodelist import expand_nodes
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count, format_duration
from megatron_lite.ops import slurm
from megatron_lite.ops.exclude import EXCLUDE_NAME
from megatron_lite.ops.job import Job
from megatron_lite.ops.resources import UNLIMITED, parse_time

TIMEOUT = 30
"""Seconds after which sinfo is ignored."""


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster.

    Attributes:
        nodes: number of nodes.
        time_limit: in seconds; None: unlimited.
        is_default: jobs without --partition run there.
        is_up: new jobs can start.
    """

    nodes: int
    time_limit: int | None
    is_default: bool
    is_up: bool


def read_partitions() -> dict[str, Partition] | None:
    """Return the partitions by name; None: Slurm is not installed here, or its controller does not answer."""
    if shutil.which("sinfo") is None:
        return None
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%P|%a|%l|%D"], capture_output=True, encoding="utf-8", check=False, timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_partitions(done.stdout) if done.returncode == 0 else None


def parse_partitions(text: str) -> dict[str, Partition]:
    """Read the output of `sinfo -h -o '%P|%a|%l|%D'`; a partition has a line for each state of its nodes."""
    found: dict[str, Partition] = {}
    for line in text.split("\n"):
        columns = line.strip().split("|")
        if len(columns) != 4:
            continue
        name, state, limit, nodes = columns
        seconds = None if limit.upper() in (*UNLIMITED, "N/A") else parse_time(limit)
        earlier = found.get(name.rstrip("*"))
        found[name.rstrip("*")] = Partition(
            int(nodes) + (earlier.nodes if earlier else 0), seconds, name.endswith("*"), state == "up"
        )
    return found


def partition_problems(job: Job, partitions: dict[str, Partition]) -> Iterator[ConfigError]:
    """Yield an error for each reason why no partition that the job names can run it."""
    asked = job.resources.options.get("partition")
    names = asked.split(",") if asked else [name for name, partition in partitions.items() if partition.is_default]
    if unknown := [name for name in names if name not in partitions]:
        yield ConfigError(
            f"The cluster has no partition {', '.join(unknown)} (--partition {asked})",
            fix=f"Give one of {', '.join(sorted(partitions))}",
        )
        return
    if not names:
        yield ConfigError(
            "The job names no partition, and the cluster has no default partition",
            fix=f"Give --partition: one of {', '.join(sorted(partitions))}",
        )
        return
    shown, candidates = ",".join(names), [partitions[name] for name in names]
    if not any(partition.is_up for partition in candidates):
        yield ConfigError(
            f"--partition {shown} is down or inactive (sinfo -p {shown})", fix="Give another partition, or wait"
        )
    limits = [partition.time_limit for partition in candidates]
    longest = None if None in limits else max(limit for limit in limits if limit is not None)
    limit = job.resources.time_limit
    if limit is not None and longest is not None and limit > longest:
        yield ConfigError(
            f"--time {job.resources.options['time']} is above the limit of partition {shown}, "
            f"{format_duration(longest)}",
            rule="Slurm would leave the job in the queue (PartitionTimeLimit)",
            fix=f"Give --time={format_duration(longest).replace('d ', '-')} or less, or another partition",
        )
    most = max(partition.nodes for partition in candidates)
    if job.num_nodes > most:
        yield ConfigError(
            f"The job requests {format_count(job.num_nodes, 'node')}, and partition {shown} has {most:,}",
            rule="Slurm would leave the job in the queue (PartitionNodeLimit)",
            fix=f"Give --nodes={most} or fewer, or another partition",
        )


def exclusion_problems(
    job: Job, partitions: Mapping[str, Partition], excluded: Collection[str], save: Path
) -> Iterator[ConfigError]:
    """Yield an error if the nodes that the exclude file leaves are too few.

    Args:
        job: the batch script.
        partitions: of the cluster, by name.
        excluded: hosts in the exclude file.
        save: the --save folder, which has the exclude file.
    """
    given = job.resources.options.get("exclude", "")
    own = set(expand_nodes(given)) if given and "/" not in given else set()
    asked = job.resources.options.get("partition")
    names = asked.split(",") if asked else [name for name, partition in partitions.items() if partition.is_default]
    nodes = {name: known for name in names if (known := slurm.node_names(name))}
    if not nodes or job.num_nodes > max(map(len, nodes.values())):
        return
    left = {name: known - {*excluded, *own} for name, known in nodes.items()}
    widest = max(left, key=lambda name: len(left[name]))
    if job.num_nodes > len(left[widest]):
        bad = sorted(nodes[widest] & {*excluded})
        also = f" and --exclude {given}" if own else ""
        fewer = f", or give --nodes={len(left[widest])}" if left[widest] else ""
        yield ConfigError(
            f"The job requests {format_count(job.num_nodes, 'node')}, and {save / EXCLUDE_NAME}{also} leaves "
            f"{len(left[widest]):,} of {len(nodes[widest]):,} in partition {widest} (excluded: {', '.join(bad)})",
            fix=f"Allow a node again with `megatron-lite doctor --forgive {(bad or ['NODE'])[0]} --save {save}`{fewer}",
        )
