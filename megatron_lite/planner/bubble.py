"""Duration of a pipeline schedule by simulation, with an extrapolation in the number of micro-batches."""

from __future__ import annotations

from functools import lru_cache

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import pipeline_schedule
from megatron_lite.schedules.simulate import Costs, simulate

SIMULATED = 4
"""Micro-batches to simulate, in multiples of the pipeline ranks; beyond them, every further one takes equally long."""
DIGITS = 3
"""Decimals of relative costs: schedules with nearly the same costs are simulated once."""


def pipeline_seconds(kind: PipelineKind, pp: int, microbatches: int, chunks: int, costs: Costs) -> float:
    """Return the time from the first rank's start to the last rank's end.

    Args:
        kind: the schedule.
        pp: pipeline ranks.
        microbatches: of one replica.
        chunks: model chunks of each rank.
        costs: seconds of a mean stage's actions and of a message, and the relative work of each stage.
    """
    unit = costs.forward + costs.backward + costs.weight
    if not microbatches or not unit:
        return 0.0
    relative = Costs(
        forward=round(costs.forward / unit, DIGITS),
        backward=round(costs.backward / unit, DIGITS),
        weight=round(costs.weight / unit, DIGITS),
        comm=round(costs.comm / unit, DIGITS),
        stages=tuple(round(work, DIGITS) for work in costs.stages),
    )
    return unit * _relative_seconds(kind, pp, microbatches, chunks, relative)


@lru_cache(maxsize=4096)
def _relative_seconds(kind: PipelineKind, pp: int, microbatches: int, chunks: int, costs: Costs) -> float:
    most = SIMULATED * pp
    if microbatches > most:
        # The rounds of the interleaved schedule have pp micro-batches: the remainder keeps its place in them.
        fewer = most - pp + microbatches % pp
        reached, before = (_simulated(kind, pp, number, chunks, costs) for number in (fewer, fewer - pp))
        return reached + (microbatches - fewer) * (reached - before) / pp
    return _simulated(kind, pp, microbatches, chunks, costs)


@lru_cache(maxsize=4096)
def _simulated(kind: PipelineKind, pp: int, microbatches: int, chunks: int, costs: Costs) -> float:
    schedule = pipeline_schedule(kind, pp, microbatches, chunks)
    return simulate(lower(schedule, kind, chunks, costs), costs).makespan
