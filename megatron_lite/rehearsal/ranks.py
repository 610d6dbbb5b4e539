"""Selects representative ranks for a rehearsal (first and last stage, uneven shards)."""

from __future__ import annotations

from megatron_lite.config.layout import AXES, rank_of
from megatron_lite.config.run import RunConfig


def telling_ranks(config: RunConfig) -> dict[int, bool]:
    """The first replica's stages and the last rank, in order, and of each whether it is to play the whole ramp-up.

    Every pipeline stage is among them. The first replica has the most micro-batches of all, and the last rank's has the
    fewest: it is the one without any in a ramp-up stage that is too small for the replicas. These two play all.
    """
    parallel = config.parallel
    last = parallel.world_size - 1
    stages = [rank_of({**dict.fromkeys(AXES, 0), "pp": stage}, parallel) for stage in range(parallel.pp)]
    return {rank: rank in (0, last) for rank in dict.fromkeys([*stages, last])}
