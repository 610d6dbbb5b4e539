"""Pipeline schedule time: graph of dependencies built once per schedule, evaluated with the costs of each layout.

The result is that of schedules/simulate.py with instant messages; with slow ones it leaves out that messages which are
started together also end together. A simulation of all messages takes a hundred times as long, and the search over
layouts evaluates a thousand of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules.lowering import source_of
from megatron_lite.schedules.pipeline import num_chunks, num_stages, pipeline_schedule, rank_of_stage
from megatron_lite.schedules.simulate import Costs, is_split

SIMULATED = 4
"""Micro-batches to simulate, in multiples of the pipeline ranks; beyond them, every further one takes equally long."""
MAX_STAGES = 128
"""Stages up to which the schedule is evaluated; for more, the bubble is that of 1F1B with equal stages."""


def pipeline_seconds(kind: PipelineKind, pp: int, microbatches: int, chunks: int, costs: Costs) -> float:
    """Return the time from the first rank's start to the last rank's end.

    Args:
        kind: the schedule.
        pp: pipeline ranks.
        microbatches: of one replica.
        chunks: model chunks of each rank.
        costs: seconds of a mean stage's actions and of a message, and the relative work of each stage.
    """
    if pp * num_chunks(kind, chunks) > MAX_STAGES:
        work = costs.forward + costs.backward + costs.weight
        return work * chunks * microbatches + (work + 2.0 * costs.comm) * (pp - 1)
    most = SIMULATED * pp
    if microbatches <= most:
        return _duration(_dependencies(kind, pp, microbatches, chunks), costs)
    # The rounds of the interleaved schedule have pp micro-batches: the remainder keeps its place in them.
    fewer = most - pp + microbatches % pp
    reached, before = (_duration(_dependencies(kind, pp, number, chunks), costs) for number in (fewer, fewer - pp))
    return reached + (microbatches - fewer) * (reached - before) / pp


class _Step(NamedTuple):
    """Action after all that it depends on, by their places in the order.

    Attributes:
        before: previous action of the same rank; -1: none.
        source: action whose result it needs; -1: none.
        remote: 1 if that result is a message.
        kind: F, B or W.
        stage: of the action.
    """

    before: int
    source: int
    remote: int
    kind: str
    stage: int


class _Dependencies(NamedTuple):
    steps: list[_Step]
    split: bool


@lru_cache(maxsize=512)
def _dependencies(kind: PipelineKind, pp: int, microbatches: int, chunks: int) -> _Dependencies:
    schedule = pipeline_schedule(kind, pp, microbatches, chunks)
    stages = num_stages(kind, pp, chunks)
    places: dict[tuple[str, int, int], int] = {}
    steps: list[_Step] = []
    done, last, moved = [0] * pp, [-1] * pp, True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while done[rank] < len(actions):
                action = actions[done[rank]]
                needed = source_of(action, stages)
                if needed is not None and needed not in places:
                    break
                source = -1 if needed is None else places[needed]
                remote = needed is not None and rank_of_stage(kind, pp, needed[1]) != rank
                places[action.kind, action.stage, action.microbatch] = len(steps)
                steps.append(_Step(last[rank], source, int(remote), action.kind, action.stage))
                last[rank] = len(steps) - 1
                done[rank] += 1
                moved = True
    return _Dependencies(steps, is_split(schedule))


def _duration(dependencies: _Dependencies, costs: Costs) -> float:
    backward = costs.backward if dependencies.split else costs.backward + costs.weight
    mean = {"F": costs.forward, "B": backward, "W": costs.weight}
    work = costs.stages or (1.0,) * (1 + max((step.stage for step in dependencies.steps), default=0))
    times = {kind: [seconds * share for share in work] for kind, seconds in mean.items()}
    ends: list[float] = []
    comm = costs.comm
    for before, source, remote, kind, stage in dependencies.steps:
        start = ends[before] if before >= 0 else 0.0
        if source >= 0:
            ready = ends[source] + comm if remote else ends[source]
            if ready > start:
                start = ready
        ends.append(start + times[kind][stage])
    return max(ends, default=0.0)
