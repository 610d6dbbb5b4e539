"""Tensors in flight: micro-batches and messages that each rank of a pipeline schedule holds during its computations.

The program of each rank is walked once. Only the states that can have the most memory are kept: those that hold no
less than any other state with the same computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import ge
from typing import NamedTuple

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import COMPUTE, Action, pipeline_schedule
from megatron_lite.schedules.simulate import is_split

MAX_SENDS = 4
"""Largest number of sent tensors that a rank keeps alive; a further send waits for the oldest."""
_ROUNDS: dict[PipelineKind, int] = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
"""Rounds of pp micro-batches after which the states of a schedule repeat, but for sends that wait."""


class HeldState(NamedTuple):
    """Tensors of a rank during one computation, besides those of its own micro-batch and chunk.

    Attributes:
        kind: F, B or W.
        chunk: chunk of the rank that computes, in the order of its stages.
        saved: for each chunk, the micro-batches whose activations are saved for backward.
        deferred: for each chunk, the micro-batches whose weight gradients are deferred.
        messages: hidden states or their gradients that were received or computed and wait to be used, or are sent.
    """

    kind: str
    chunk: int
    saved: tuple[int, ...]
    deferred: tuple[int, ...]
    messages: int


@lru_cache(maxsize=256)
def held_states(kind: PipelineKind, pp: int, microbatches: int, chunks: int = 1) -> tuple[tuple[HeldState, ...], ...]:
    """Return, for each pipeline rank, the states among which is the one with the most memory.

    Args:
        kind: the schedule.
        pp: pipeline ranks.
        microbatches: of the replica.
        chunks: model chunks of each rank, as given to pipeline_schedule.
    """
    simulated = _simulated(kind, pp, microbatches)
    program = lower(pipeline_schedule(kind, pp, simulated, chunks), kind, chunks)
    split, last = is_split(program), max((action.stage for actions in program for action in actions), default=0)
    states = [_largest(_walk(actions, split, last)) for actions in program]
    if kind == "gpipe":  # all micro-batches are in flight
        more = microbatches - simulated
        states = [[state._replace(saved=tuple(n + more for n in state.saved)) for state in own] for own in states]
    return tuple(map(tuple, states))


def _simulated(kind: PipelineKind, pp: int, microbatches: int) -> int:
    """Return a number of micro-batches that is enough to reach the most that the schedule ever has in flight."""
    if kind != "interleaved":
        return min(microbatches, _ROUNDS[kind] * pp + MAX_SENDS)
    # The size of a round depends on the number of micro-batches (schedules/pipeline.py).
    rounds = max(1, microbatches // pp)
    shown = min(rounds, _ROUNDS[kind])
    return shown * (microbatches // rounds) + min(microbatches % rounds, shown)


def _walk(actions: Sequence[Action], split: bool, last_stage: int) -> list[HeldState]:
    stages = sorted({action.stage for action in actions})
    chunk_of = {stage: chunk for chunk, stage in enumerate(stages)}
    saved, deferred = [0] * len(stages), [0] * len(stages)
    waiting = 0
    sending: deque[None] = deque()
    states = []
    position = 0
    while position < len(actions):
        action = actions[position]
        if action.kind not in COMPUTE:
            end = position
            while end < len(actions) and actions[end].kind not in COMPUTE:
                end += 1
            sends = sum(message.kind.startswith("SEND") for message in actions[position:end])
            while len(sending) > MAX_SENDS - sends and sending:
                sending.popleft()
            sending.extend([None] * sends)
            waiting += end - position - 2 * sends
            position = end
            continue
        chunk = chunk_of[action.stage]
        if action.kind == "F":
            waiting -= action.stage > 0
        elif action.kind == "B":
            waiting -= action.stage < last_stage
            saved[chunk] -= 1
        else:
            deferred[chunk] -= 1
        states.append(HeldState(action.kind, chunk, tuple(saved), tuple(deferred), waiting + len(sending)))
        if action.kind == "F":
            saved[chunk] += 1
            waiting += action.stage < last_stage
        elif action.kind == "B":
            deferred[chunk] += split
            waiting += action.stage > 0
        position += 1
    return states


def _largest(states: Iterable[HeldState]) -> list[HeldState]:
    """Return the states that hold no less than any other one with the same computation in at least one respect."""
    found: dict[tuple[str, int], list[HeldState]] = {}
    for state in dict.fromkeys(states):
        largest = found.setdefault((state.kind, state.chunk), [])
        if not any(_covers(other, state) for other in largest):
            largest[:] = [other for other in largest if not _covers(state, other)]
            largest.append(state)
    return [state for largest in found.values() for state in largest]


def _covers(one: HeldState, other: HeldState) -> bool:
    """Return whether a state holds at least as much as another one in every respect."""
    return (
        one.messages >= other.messages
        and all(map(ge, one.saved, other.saved))
        and all(map(ge, one.deferred, other.deferred))
    )
