"""Lowering of a pipeline schedule: inserts sends and receives for all ranks.

Times are taken from a run on paper in which messages are instant and nobody waits to send. Each message is one event at
the moment its data is ready, every computation one at its start, and all events of all ranks are put into one total
order, in time. A rank's program is the events it takes part in, in that order. So the first event not yet run can
always run: both its ranks have nothing else before it. That is why no program deadlocks, not even where a send blocks
until its receive is reached; it holds whatever the real times are. Inserting messages rank by rank has no such order:
under 1f1b two neighbours would send to each other first.
"""

from __future__ import annotations

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules.pipeline import Action, ActionKind, Schedule, num_stages, rank_of_stage
from megatron_lite.schedules.simulate import Costs, is_split

_MESSAGES: dict[ActionKind, tuple[ActionKind, ActionKind]] = {"F": ("SEND_F", "RECV_F"), "B": ("SEND_B", "RECV_B")}
_Key = tuple[float, int, int, int]


def lower(schedule: Schedule, kind: PipelineKind, chunks: int = 1, costs: Costs | None = None) -> Schedule:
    """The program of every pipeline rank: its compute actions with the sends and receives between them.

    Neighbouring stages on one rank (two chunks at the tip of zb-v's V, everything if pp is 1) get no messages; the
    executor hands the tensor over. Messages between two computations are adjacent, so a transport may batch them.

    Args:
        schedule: from pipeline_schedule.
        kind: whose placement of stages on ranks holds.
        chunks: as given to pipeline_schedule.
        costs: expected times, all above 0; they decide where messages stand, not whether the program is valid.
    """
    pp, costs = len(schedule), costs or Costs()
    stages, split = num_stages(kind, pp, chunks), is_split(schedule)
    events: list[tuple[_Key, int, Action]] = []
    for rank, starts in enumerate(_starts(schedule, stages, costs)):
        for action, start in zip(schedule[rank], starts, strict=True):
            events.append(((start, 1, action.stage, action.microbatch), rank, action))
            target = _target(action, stages)
            peer = rank if target is None else rank_of_stage(kind, pp, target)
            if target is None or peer == rank:
                continue
            # At the same time messages come before computations, which may be waiting for them.
            key = (start + costs.of(action, split), 0, action.stage, action.microbatch)
            send, receive = _MESSAGES[action.kind]
            events.append((key, rank, Action(send, action.stage, action.microbatch, peer)))
            events.append((key, peer, Action(receive, target, action.microbatch, rank)))
    program: Schedule = [[] for _ in schedule]
    for _, rank, action in sorted(events, key=lambda event: event[0]):
        program[rank].append(action)
    return program


def _target(action: Action, stages: int) -> int | None:
    """Stage that needs the result of `action`, if there is one."""
    target = action.stage + {"F": 1, "B": -1}.get(action.kind, 0)
    return target if target != action.stage and 0 <= target < stages else None


def _source(action: Action, stages: int) -> tuple[str, int, int] | None:
    """Kind, stage and micro-batch of the computation whose result `action` needs, if there is one."""
    if action.kind == "F":
        return ("F", action.stage - 1, action.microbatch) if action.stage > 0 else None
    if action.kind == "B" and action.stage < stages - 1:
        return "B", action.stage + 1, action.microbatch
    return ("F" if action.kind == "B" else "B"), action.stage, action.microbatch


def _starts(schedule: Schedule, stages: int, costs: Costs) -> list[list[float]]:
    """Start of every compute action if messages are instant and sending never waits."""
    split, ends = is_split(schedule), dict[tuple[str, int, int], float]()
    starts: list[list[float]] = [[] for _ in schedule]
    clocks, moved = [0.0] * len(schedule), True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while len(starts[rank]) < len(actions):
                action = actions[len(starts[rank])]
                source = _source(action, stages)
                if source is not None and source not in ends:
                    break
                start = clocks[rank] if source is None else max(clocks[rank], ends[source])
                clocks[rank] = start + costs.of(action, split)
                ends[action.kind, action.stage, action.microbatch] = clocks[rank]
                starts[rank].append(start)
                moved = True
    assert all(len(done) == len(actions) for done, actions in zip(starts, schedule, strict=True)), "no valid order"
    return starts
