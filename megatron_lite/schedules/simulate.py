"""Pipeline simulator: start times, bubble, peak activations and deadlocks of a schedule.

There are two transports. The *blocking* transport stalls both ranks of a message until both have reached it and the
data is transferred (rendezvous, the strictest transport). The *overlapping* transport is that of the executor on NCCL:
adjacent messages of a rank are one batch, which starts once the computation before it and the rank's previous batch
have ended. A message takes its time from the start of both batches that hold it; a batch ends with its last message.
Computation continues meanwhile: a forward or backward waits only for the batch that holds its input. The executor's
limit on sends in flight is left out: it only matters where messages take longer than computations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from megatron_lite.schedules.pipeline import COMPUTE, Action, ActionKind, Schedule


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
    def blocked(self) -> tuple[float, ...]:
        """Time that each rank waits for inputs between its first and its last action."""
        pairs = [pairwise(spans) for spans in self.ranks]
        return tuple(sum(after.start - before.end for before, after in of_rank) for of_rank in pairs)

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


@dataclass(eq=False)
class _Batch:
    """Adjacent messages of a rank, after `position` computations."""

    messages: list[Action]
    position: int
    partners: list[_Batch] = field(default_factory=list)
    """For each message the batch that holds its other end."""
    start: float | None = None
    end: float | None = None


def _run_overlapping(program: Schedule, costs: Costs, split: bool) -> list[list[Span]]:
    compute = [[action for action in actions if action.kind in COMPUTE] for actions in program]
    batches = [_batches(actions) for actions in program]
    inputs = _connect(batches)
    spans: list[list[Span]] = [[] for _ in program]
    clocks, ended = [0.0] * len(program), [0] * len(program)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(compute):
            while len(spans[rank]) < len(actions):
                action = actions[len(spans[rank])]
                received = inputs[action].end if action in inputs else 0.0
                if received is None:
                    break
                start = max(clocks[rank], received)
                clocks[rank] = start + costs.of(action, split)
                spans[rank].append(Span(action, start, clocks[rank]))
                moved = True
            while ended[rank] < len(batches[rank]):
                batch = batches[rank][ended[rank]]
                if batch.start is None and batch.position <= len(spans[rank]):
                    before = spans[rank][batch.position - 1].end if batch.position else 0.0
                    previous = batches[rank][ended[rank] - 1].end if ended[rank] else 0.0
                    batch.start = max(before, previous or 0.0)
                    moved = True
                starts = [partner.start for partner in batch.partners if partner.start is not None]
                if batch.start is None or len(starts) < len(batch.messages):
                    break
                batch.end = max(batch.start, *starts) + costs.comm
                ended[rank] += 1
                moved = True
    if any(len(done) < len(actions) for done, actions in zip(spans, compute, strict=True)) or any(
        done < len(of_rank) for done, of_rank in zip(ended, batches, strict=True)
    ):
        waiting = [[message for batch in of_rank for message in batch.messages[:1]] for of_rank in batches]
        raise DeadlockError(_stuck([*compute, *waiting], [*map(len, spans), *ended]))
    return spans


def _batches(actions: list[Action]) -> list[_Batch]:
    """Return the batches of adjacent messages of a rank, in order."""
    found, position = [], 0
    for is_compute, adjacent in groupby(actions, key=lambda action: action.kind in COMPUTE):
        if is_compute:
            position += len(list(adjacent))
        else:
            found.append(_Batch(list(adjacent), position))
    return found


def _connect(batches: list[list[_Batch]]) -> dict[Action, _Batch]:
    """Fill the partners of batches; return, for each computation with a received input, the batch that holds it."""
    inputs: dict[Action, _Batch] = {}
    messages = [(message, batch) for of_rank in batches for batch in of_rank for message in batch.messages]
    for message, batch in messages:
        if message.kind == "RECV_F" or message.kind == "RECV_B":
            inputs[_consumer(message)] = batch
    for message, batch in messages:
        if message.kind.startswith("SEND") and (receiver := inputs.get(_consumer(message))) is not None:
            batch.partners.append(receiver)
            receiver.partners.append(batch)
    return inputs


def _consumer(message: Action) -> Action:
    """Return the computation that uses the data of a send or receive."""
    kind: ActionKind = "F" if message.kind.endswith("F") else "B"
    step = {"SEND_F": 1, "SEND_B": -1}.get(message.kind, 0)
    return Action(kind, message.stage + step, message.microbatch)


def _peer(action: Action) -> int:
    assert action.peer is not None, f"{action} has no peer"
    return action.peer


def _meets(send: Action, rank: int, program: Schedule, position: list[int]) -> bool:
    """Return whether the peer of `send` on `rank` has reached the matching receive."""
    peer = _peer(send)
    if position[peer] >= len(program[peer]):
        return False
    other = program[peer][position[peer]]
    return other.kind.startswith("RECV") and (_consumer(other), other.peer) == (_consumer(send), rank)


def _stuck(program: Schedule, position: list[int]) -> str:
    at = [str(actions[i]) if i < len(actions) else "done" for actions, i in zip(program, position, strict=True)]
    return "deadlock, no rank can proceed: " + ", ".join(f"{number} at {where}" for number, where in enumerate(at))
