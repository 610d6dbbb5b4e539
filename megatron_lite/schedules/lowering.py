"""Lowering of a pipeline schedule: inserts sends and receives for all ranks.

The schedule is simulated with instant messages and non-blocking sends. Each message becomes an event at the time when
its data is ready, each computation an event at its start, and all events of all ranks are sorted into one total order.
The program of a rank consists of its events in that order. The first pending event can always run, because both of its
ranks have finished everything before it. Hence no program deadlocks, whatever the real times are, even if a send blocks
until the matching receive is reached. Inserting messages rank by rank gives no such guarantee: under 1f1b two
neighbours would both send first.
"""

from __future__ import annotations

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules.pipeline import Action, ActionKind, Schedule, num_stages, rank_of_stage
from megatron_lite.schedules.simulate import Costs, is_split

_MESSAGES: dict[ActionKind, tuple[ActionKind, ActionKind]] = {"F": ("SEND_F", "RECV_F"), "B": ("SEND_B", "RECV_B")}
_Key = tuple[float, int, int, int]


def lower(schedule: Schedule, kind: PipelineKind, chunks: int = 1, costs: Costs | None = None) -> Schedule:
    """Return the program of every pipeline rank: compute actions with sends and receives between them.

    Neighbouring stages on one rank (the two chunks of the last rank under zb-v, all chunks if pp is 1) need no message:
    the executor passes the tensor on. Messages between two computations are adjacent; the executor starts them as one
    batch.

    Args:
        schedule: result of pipeline_schedule.
        kind: schedule that determines the placement of stages on ranks.
        chunks: as given to pipeline_schedule.
        costs: expected times, all above 0. They determine the position of messages; any times give a valid program.
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
            # At equal times messages come before computations, which may depend on them.
            key = (start + costs.of(action, split), 0, action.stage, action.microbatch)
            send, receive = _MESSAGES[action.kind]
            events.append((key, rank, Action(send, action.stage, action.microbatch, peer)))
            events.append((key, peer, Action(receive, target, action.microbatch, rank)))
    program: Schedule = [[] for _ in schedule]
    for _, rank, action in sorted(events, key=lambda event: event[0]):
        program[rank].append(action)
    return program


def _target(action: Action, stages: int) -> int | None:
    """Return the stage that needs the result of `action`; None: no stage does."""
    target = action.stage + {"F": 1, "B": -1}.get(action.kind, 0)
    return target if target != action.stage and 0 <= target < stages else None


def source_of(action: Action, stages: int) -> tuple[str, int, int] | None:
    """Return (kind, stage, micro-batch) of the computation whose result `action` needs; None: no computation."""
    if action.kind == "F":
        return ("F", action.stage - 1, action.microbatch) if action.stage > 0 else None
    if action.kind == "B" and action.stage < stages - 1:
        return "B", action.stage + 1, action.microbatch
    return ("F" if action.kind == "B" else "B"), action.stage, action.microbatch


def _starts(schedule: Schedule, stages: int, costs: Costs) -> list[list[float]]:
    """Return the start time of every compute action with instant messages and non-blocking sends."""
    split, ends = is_split(schedule), dict[tuple[str, int, int], float]()
    starts: list[list[float]] = [[] for _ in schedule]
    clocks, moved = [0.0] * len(schedule), True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule):
            while len(starts[rank]) < len(actions):
                action = actions[len(starts[rank])]
                source = source_of(action, stages)
                if source is not None and source not in ends:
                    break
                start = clocks[rank] if source is None else max(clocks[rank], ends[source])
                clocks[rank] = start + costs.of(action, split)
                ends[action.kind, action.stage, action.microbatch] = clocks[rank]
                starts[rank].append(start)
                moved = True
    assert all(len(done) == len(actions) for done, actions in zip(starts, schedule, strict=True)), "no valid order"
    return starts
