from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import COMPUTE, SPLIT_BACKWARD, num_stages, pipeline_schedule, rank_of_stage
from megatron_lite.schedules.simulate import Costs, simulate


def test_messages_are_between_the_computations_that_need_them():
    program = lower(pipeline_schedule("1f1b", 2, 2), "1f1b")
    assert [" ".join(map(str, actions)) for actions in program] == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]
    assert [action.peer for action in program[0]] == [None, 1, None, 1, 1, None, 1, None]


def test_one_rank_sends_nothing():
    schedule = pipeline_schedule("interleaved", 1, 3, 2)
    assert lower(schedule, "interleaved", 2) == schedule


def play(program, kind, chunks):
    """Execute `program` with blocking transport and sets in place of tensors; fail if an input is missing."""
    pp, position = len(program), [0] * len(program)
    stages = num_stages(kind, pp, chunks)
    held: list[set[tuple[str, int, int]]] = [set() for _ in program]

    def compute(rank, action):
        stage, m, have = action.stage, action.microbatch, held[rank]
        assert rank_of_stage(kind, pp, stage) == rank
        if action.kind == "F":
            assert stage == 0 or ("input", stage, m) in have
            have |= {("saved", stage, m), ("output", stage, m)}
            if stage + 1 < stages and rank_of_stage(kind, pp, stage + 1) == rank:
                have.add(("input", stage + 1, m))
        elif action.kind == "B":
            assert ("saved", stage, m) in have
            assert stage == stages - 1 or ("grad output", stage, m) in have
            have |= {("grad input", stage, m), ("for weights", stage, m)}
            if stage > 0 and rank_of_stage(kind, pp, stage - 1) == rank:
                have.add(("grad output", stage - 1, m))
        else:
            assert ("for weights", stage, m) in have

    def meet(rank, action):
        """Whether the message could pass."""
        peer = action.peer
        if position[peer] == len(program[peer]):
            return False
        other, forward = program[peer][position[peer]], action.kind == "SEND_F"
        target = action.stage + (1 if forward else -1)
        if (other.kind, other.stage, other.microbatch) != (f"RECV_{action.kind[-1]}", target, action.microbatch):
            return False
        assert other.peer == rank
        assert ("output" if forward else "grad input", action.stage, action.microbatch) in held[rank]
        held[peer].add(("input" if forward else "grad output", target, action.microbatch))
        return True

    while any(at < len(actions) for at, actions in zip(position, program, strict=True)):
        before = list(position)
        for rank, actions in enumerate(program):
            if position[rank] == len(actions):
                continue
            action = actions[position[rank]]
            if action.kind in COMPUTE:
                compute(rank, action)
                position[rank] += 1
            elif action.kind.startswith("SEND") and meet(rank, action):
                position[rank] += 1
                position[action.peer] += 1
        assert position != before, "deadlock"


@st.composite
def pipelines(draw):
    kind = draw(st.sampled_from(get_args(PipelineKind)))
    chunks = draw(st.integers(1, 4)) if kind == "interleaved" else 2 if kind == "zb-v" else 1
    return kind, draw(st.integers(1, 9)), draw(st.integers(0, 30)), chunks


TIMES = st.sampled_from([0.1, 0.5, 1.0, 1.7, 3.0])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    pipelines(), st.builds(Costs, forward=TIMES, backward=TIMES, weight=TIMES, comm=st.sampled_from([0.0, 0.3, 5.0]))
)
def test_any_pipeline_runs_everything_once_in_a_valid_order_without_deadlock(pipeline, costs):
    kind, pp, m, chunks = pipeline
    schedule = pipeline_schedule(kind, pp, m, chunks)
    kinds = ("F", "B", "W") if kind in SPLIT_BACKWARD else ("F", "B")
    expected = Counter((k, stage, i) for k in kinds for stage in range(num_stages(kind, pp, chunks)) for i in range(m))
    assert Counter((a.kind, a.stage, a.microbatch) for actions in schedule for a in actions) == expected

    program = lower(schedule, kind, chunks, costs)
    assert [[a for a in actions if a.kind in COMPUTE] for actions in program] == schedule
    borders = sum(
        rank_of_stage(kind, pp, s) != rank_of_stage(kind, pp, s + 1) for s in range(num_stages(kind, pp, chunks) - 1)
    )
    messages = [action for actions in program for action in actions if action.kind not in COMPUTE]
    assert len(messages) == len(set(messages)) == 4 * borders * m
    play(program, kind, chunks)
    for blocking in (False, True):
        timeline = simulate(program, costs, blocking=blocking)
        assert [[span.action for span in spans] for spans in timeline.ranks] == schedule


@pytest.mark.parametrize("stages", [(1.0, 1.0, 1.0, 3.0), (4.0, 1.0, 1.0, 1.0)])
def test_unequal_stages_do_not_deadlock(stages):
    for kind in ("1f1b", "zb-h1"):
        costs = Costs(stages=stages, comm=0.25)
        play(lower(pipeline_schedule(kind, 4, 7), kind, costs=costs), kind, 1)
