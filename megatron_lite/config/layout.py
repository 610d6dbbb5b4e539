"""Device mesh layout: mapping between ranks and coordinates, and the rows of ranks along one or several axes.

Ranks are numbered over the axes in order, the first fastest:
rank = tp + tp_size * (cp + cp_size * (dp + dp_size * pp)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_lite.config.parallel import ParallelConfig

AXES = ("tp", "cp", "dp", "pp")
"""Axes of the mesh; tp varies fastest, so that its ranks are neighbours on one node."""

Coordinates = Mapping[str, int]
"""Coordinate of a rank on each axis."""
Partition = tuple[tuple[int, ...], ...]
"""Rows of ranks that together contain each rank once."""


def axis_sizes(parallel: ParallelConfig) -> dict[str, int]:
    """Return the size of each axis, in the order of AXES."""
    sizes = {"tp": parallel.tp, "cp": parallel.cp, "dp": parallel.dp, "pp": parallel.pp}
    return {axis: sizes[axis] for axis in AXES}


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return the sizes of all axes as text, that of cp only where the sequence is split."""
    context = f" x context {sizes['cp']}" if sizes["cp"] > 1 else ""
    return f"tensor {sizes['tp']}{context} x pipeline {sizes['pp']} x data {sizes['dp']}"


def coordinates(rank: int, parallel: ParallelConfig) -> Coordinates:
    """Return the coordinates of a rank, in the order of AXES."""
    at = {}
    for axis, size in axis_sizes(parallel).items():
        rank, at[axis] = divmod(rank, size)
    return at


def describe_coordinates(at: Coordinates, parallel: ParallelConfig) -> str:
    """Return the coordinates of a rank as text, cp only where the sequence is split."""
    return ", ".join(f"{axis} {at[axis]}" for axis in shown_axes(parallel.cp))


def shown_axes(cp: int) -> list[str]:
    """Return the axes in the order in which texts give coordinates: the slowest first, cp only if its size is not 1."""
    return ["dp", "pp", *(["cp"] if cp > 1 else []), "tp"]


def rank_of(at: Coordinates, parallel: ParallelConfig) -> int:
    """Return the rank at the given coordinates."""
    rank, stride = 0, 1
    for axis, size in axis_sizes(parallel).items():
        rank += stride * at[axis]
        stride *= size
    return rank


def partitions(axes: str | Sequence[str], parallel: ParallelConfig) -> Partition:
    """Return all rows of ranks along one or several axes: ranks of a row differ in these coordinates only.

    Args:
        axes: an axis, or several; AXES: one row of all ranks.
        parallel: the sizes of the mesh.

    Returns:
        Rows in the order of their first rank; the ranks of a row in rising order.
    """
    along = {axes} if isinstance(axes, str) else set(axes)
    sizes = axis_sizes(parallel)
    assert along <= set(sizes), (axes, tuple(sizes))
    rows: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        at = coordinates(rank, parallel)
        rows.setdefault(tuple(at[axis] for axis in AXES if axis not in along), []).append(rank)
    return tuple(map(tuple, rows.values()))


def subset_partition(partition: Partition, places: Sequence[int]) -> Partition:
    """Return the ranks at some places of each row as one row each, and every other rank as a row of its own."""
    chosen = tuple(tuple(row[place] for place in places) for row in partition)
    return chosen + tuple((rank,) for row in partition for place, rank in enumerate(row) if place not in places)
