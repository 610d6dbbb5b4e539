"""Pipeline simulator: start times, bubble, peak activations and deadlocks of a schedule.

There are two transports. The *blocking* transport stalls both ranks of a message until both have reached it and the
data is transferred (rendezvous, the strictest transport). The *overlapping* transport, as NCCL's, transfers data in
parallel with computation, one message at a time per rank in list order; a computation waits for its inputs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.schedules.pipeline import COMPUTE, Action, Schedule


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time of each action, in any unit; an unsplit backward takes backward + weight."""

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    comm: float = 0.0
    """Time of one P2P message."""
    stages: tuple[float, ...] = ()
    """Relative compute time of each stage; empty: all equal."""

    def of(self, action: Action, split: bool) -> float:
        """Return the time of `action`; `split`: the schedule has weight gradients as separate actions."""
        if action.kind not in COMPUTE:
            return self.comm
        whole = self.backward if split else self.backward + self.weight
        time = {"F": self.forward, "B": whole, "W": self.weight}[action.kind]
        return time * self.stages[action.stage] if self.stages else time


@dataclass(frozen=True)
class Span:
    """Compute action with its start and end time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Result of a simulation: compute actions of each rank with their start and end times."""

    ranks: tuple[tuple[Span, ...], ...]
    peak_activations: tuple[int, ...]
    """Largest number of stage inputs (of one chunk each) that each rank holds at once for later backwards."""

    @property
    def makespan(self) -> float:
        """Time from the first rank's start to the last rank's end."""
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)

    @property
    def bubble(self) -> float:
        """Idle share of the rank with the longest time between its first and its last action.

        Definition of Qi et al. 2023, arXiv:2401.10241; the wait for the first input overlaps with the end of the
        previous iteration.
        """
        longest = max((spans[-1].end - spans[0].start for spans in self.ranks if spans), default=0.0)
        work = max((sum(span.end - span.start for span in spans) for spans in self.ranks), default=0.0)
        return 1.0 - work / longest if longest else 0.0


class DeadlockError(Exception):
    """No rank can proceed although some are unfinished; the message lists the pending action of each rank."""


def is_split(schedule: Schedule) -> bool:
    """Return whether weight gradients are separate actions."""
    return any(action.kind == "W" for actions in schedule for action in actions)


def peak_activations(actions: Sequence[Action], split: bool) -> int:
    """Return the peak number of live (stage, micro-batch) activations on the rank that runs `actions` in order."""
    alive = peak = 0
    for action in actions:
        alive += (action.kind == "F") - (action.kind == ("W" if split else "B"))
        peak = max(peak, alive)
    return peak


def simulate(program: Schedule, costs: Costs | None = None, *, blocking: bool = False) -> Timeline:
    """Simulate a lowered program.

    Args:
        program: compute actions, sends and receives of every rank, from lowering.lower.
        costs: time of each action; by default F = B = W = 1 and messages are instant.
        blocking: True for the blocking transport, False for the overlapping one.

    Raises:
        DeadlockError: the program cannot finish under rendezvous transport.
    """
    costs = costs or Costs()
    split = is_split(program)
    spans = _run_blocking(program, costs, split) if blocking else _run_overlapping(program, costs, split)
    return Timeline(
        ranks=tuple(tuple(of_rank) for of_rank in spans),
        peak_activations=tuple(peak_activations(actions, split) for actions in program),
    )


def _run_blocking(program: Schedule, costs: Costs, split: bool) -> list[list[Span]]:
    clocks, position = [0.0] * len(program), [0] * len(program)
    spans: list[list[Span]] = [[] for _ in program]
    while any(at < len(actions) for at, actions in zip(position, program, strict=True)):
        moved = False
        for rank, actions in enumerate(program):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                time = costs.of(action, split)
                if action.kind in COMPUTE:
                    spans[rank].append(Span(action, clocks[rank], clocks[rank] + time))
                    clocks[rank] += time
                elif action.kind.startswith("SEND") and _meets(action, rank, program, position):
                    peer = _peer(action)
                    clocks[rank] = clocks[peer] = max(clocks[rank], clocks[peer]) + time
                    position[peer] += 1
                else:
                    break
                position[rank] += 1
                moved = True
        if not moved:
            raise DeadlockError(_stuck(program, position))
    return spans


def _run_overlapping(program: Schedule, costs: Costs, split: bool) -> list[list[Span]]:
    compute = [[action for action in actions if action.kind in COMPUTE] for actions in program]
    queues = [[action for action in actions if action.kind not in COMPUTE] for actions in program]
    clocks, wires = [0.0] * len(program), [0.0] * len(program)
    at, queued = [0] * len(program), [0] * len(program)
    needs = [_needs(actions) for actions in program]
    ready: dict[tuple[int, Action], float] = {}
    spans: list[list[Span]] = [[] for _ in program]
    moved = True
    while moved:
        moved = False
        for rank in range(len(program)):
            while at[rank] < len(compute[rank]):
                action = compute[rank][at[rank]]
                waits = [ready.get((rank, need)) for need in needs[rank][action]]
                if None in waits:
                    break
                start = max([clocks[rank], *(wait for wait in waits if wait is not None)])
                clocks[rank] = ready[rank, action] = start + costs.of(action, split)
                spans[rank].append(Span(action, start, clocks[rank]))
                at[rank] += 1
                moved = True
            while queued[rank] < len(queues[rank]):
                message = queues[rank][queued[rank]]
                produced = ready.get((rank, Action("F" if message.kind == "SEND_F" else "B", *_unit_of(message))))
                if not message.kind.startswith("SEND") or produced is None or not _meets(message, rank, queues, queued):
                    break
                peer = _peer(message)
                received = queues[peer][queued[peer]]
                end = max(wires[rank], wires[peer], produced) + costs.of(message, split)
                wires[rank] = wires[peer] = ready[peer, received] = end
                queued[rank] += 1
                queued[peer] += 1
                moved = True
    if any(done < len(actions) for done, actions in zip([*at, *queued], [*compute, *queues], strict=True)):
        raise DeadlockError(_stuck([*compute, *queues], [*at, *queued]))
    return spans


def _needs(actions: list[Action]) -> dict[Action, list[Action]]:
    """Return, for each compute action, the receives on the same rank that it depends on."""
    needs: dict[Action, list[Action]] = {}
    received: dict[tuple[str, int, int], Action] = {
        (a.kind, *_unit_of(a)): a for a in actions if a.kind.startswith("RECV")
    }
    for action in actions:
        if action.kind in COMPUTE:
            message = received.get((f"RECV_{action.kind}", *_unit_of(action)))
            needs[action] = [message] if message else []
    return needs


def _unit_of(action: Action) -> tuple[int, int]:
    return action.stage, action.microbatch


def _peer(action: Action) -> int:
    assert action.peer is not None, f"{action} has no peer"
    return action.peer


def _meets(send: Action, rank: int, program: Schedule, position: list[int]) -> bool:
    """Return whether the peer of `send` on `rank` has reached the matching receive."""
    peer = _peer(send)
    if position[peer] >= len(program[peer]):
        return False
    stage = send.stage + (1 if send.kind == "SEND_F" else -1)
    kind = send.kind.replace("SEND", "RECV")
    other = program[peer][position[peer]]
    return (other.kind, other.stage, other.microbatch, other.peer) == (kind, stage, send.microbatch, rank)


def _stuck(program: Schedule, position: list[int]) -> str:
    at = [str(actions[i]) if i < len(actions) else "done" for actions, i in zip(program, position, strict=True)]
    return "deadlock, no rank can proceed: " + ", ".join(f"{number} at {where}" for number, where in enumerate(at))
