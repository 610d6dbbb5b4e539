"""Mapping between ranks and mesh coordinates, and the rank groups of every mesh axis."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.parallel import ParallelConfig

AXES = ("tp", "pp", "dp", "mp", "embedding", "world")


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on the axes of the mesh."""

    tp: int
    dp: int
    pp: int


def coordinates(rank: int, parallel: ParallelConfig) -> Coordinates:
    """Coordinates of `rank`: rank = (pp * dp_size + dp) * tp_size + tp."""
    block, tp = divmod(rank, parallel.tp)
    pp, dp = divmod(block, parallel.dp)
    return Coordinates(tp=tp, dp=dp, pp=pp)


def rank_of(at: Coordinates, parallel: ParallelConfig) -> int:
    """The rank that stands at these coordinates."""
    return (at.pp * parallel.dp + at.dp) * parallel.tp + at.tp


def partitions(axis: str, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    """All rows of an axis; each row's ranks in the order of their coordinates along it.

    Args:
        axis: tp, pp, dp; mp (one replica's tp × pp ranks, tp fastest); embedding (first and last of each pp row; the
            ranks between them are alone); world (one row of all).
        parallel: the mesh's sizes.
    """
    tp_size, dp_size, pp_size = parallel.tp, parallel.dp, parallel.pp

    def rank(tp: int, dp: int, pp: int) -> int:
        return rank_of(Coordinates(tp=tp, dp=dp, pp=pp), parallel)

    tps, dps, pps = range(tp_size), range(dp_size), range(pp_size)
    if axis == "tp":
        return tuple(tuple(rank(tp, dp, pp) for tp in tps) for pp in pps for dp in dps)
    if axis == "dp":
        return tuple(tuple(rank(tp, dp, pp) for dp in dps) for pp in pps for tp in tps)
    if axis == "pp":
        return tuple(tuple(rank(tp, dp, pp) for pp in pps) for dp in dps for tp in tps)
    if axis == "embedding":
        rows = partitions("pp", parallel)
        ends = tuple((row[0], row[-1]) for row in rows) if pp_size > 1 else rows
        return ends + tuple((middle,) for row in rows for middle in row[1:-1])
    if axis == "mp":
        return tuple(tuple(rank(tp, dp, pp) for pp in pps for tp in tps) for dp in dps)
    assert axis == "world", axis
    return (tuple(range(tp_size * dp_size * pp_size)),)
