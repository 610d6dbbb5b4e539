from __future__ import annotations

import pytest

from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import Action, pipeline_schedule
from megatron_lite.schedules.simulate import Costs, DeadlockError, peak_activations, simulate


def timeline(kind, pp, m, chunks=1, costs=None, blocking=False):
    return simulate(lower(pipeline_schedule(kind, pp, m, chunks), kind, chunks, costs), costs, blocking=blocking)


SIZES = [(1, 1), (2, 2), (2, 7), (4, 4), (4, 8), (5, 13), (8, 8), (8, 32)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_fractions_equal_the_published_formulas(p, m):
    assert timeline("gpipe", p, m).bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline("1f1b", p, m).bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline("zb-h1", p, m).bubble == pytest.approx((p - 1) / (3 * m + p - 1))
    for v in (2, 3):
        assert timeline("interleaved", p, m, v).bubble == pytest.approx((p - 1) / (v * m + p - 1))
    assert timeline("zb-v", p, max(m, 2 * p)).bubble == pytest.approx(0)


@pytest.mark.parametrize(("p", "m"), [(3, 4), (4, 9), (8, 17), (8, 15), (4, 30)])
def test_interleaved_needs_no_whole_rounds(p, m):
    assert timeline("interleaved", p, m, 2).bubble == pytest.approx((p - 1) / (2 * m + p - 1))


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "zb-h1", "zb-v"])
def test_blocking_sends_are_free_for_equal_times(kind, p, m):
    assert timeline(kind, p, m, blocking=True).makespan == timeline(kind, p, m).makespan


def test_activations_held():
    assert timeline("gpipe", 4, 8).peak_activations == (8, 8, 8, 8)
    assert timeline("1f1b", 4, 8).peak_activations == (4, 3, 2, 1)
    assert timeline("zb-h1", 4, 8).peak_activations == (4, 4, 4, 4)
    assert timeline("zb-v", 4, 8).peak_activations == (8, 8, 8, 8)
    assert timeline("interleaved", 4, 8, 2).peak_activations == (11, 9, 7, 5)
    assert timeline("1f1b", 4, 2).peak_activations == (2, 2, 2, 1)
    assert peak_activations([], split=False) == 0


def test_no_work_takes_no_time():
    idle = timeline("1f1b", 4, 0)
    assert (idle.makespan, idle.bubble, idle.peak_activations) == (0.0, 0.0, (0, 0, 0, 0))


def test_times_of_one_micro_batch():
    costs = Costs(forward=1, backward=2, weight=3, comm=0.5)
    line = timeline("1f1b", 2, 1, costs=costs)
    assert [(str(s.action), s.start, s.end) for spans in line.ranks for s in spans] == [
        ("0F0", 0, 1),
        ("0B0", 8, 13),
        ("1F0", 1.5, 2.5),
        ("1B0", 2.5, 7.5),
    ]
    assert line.makespan == 13
    # Split, the gradient goes back before the weights get theirs.
    assert timeline("zb-h1", 2, 1, costs=costs).ranks[0][1].start == 5


def test_messages_start_after_the_computation_before_them():
    line = timeline("gpipe", 3, 3, costs=Costs(comm=2.0))
    # Rank 1 receives at 1-3. The second receive is in one batch with the first send, after F0: 4-6; the third: 7-9.
    assert [span.start for span in line.ranks[1][:3]] == [3, 6, 9]


def test_waiting_for_messages():
    line = timeline("1f1b", 2, 1, costs=Costs(forward=1, backward=2, weight=3, comm=0.5))
    assert line.blocked == (7.0, 0.0)  # rank 0: from its forward to the gradient: 0.5 + 1 + 5 + 0.5
    assert timeline("gpipe", 3, 3, costs=Costs(comm=2.0)).blocked[1] > 4
    assert timeline("1f1b", 4, 0).blocked == (0, 0, 0, 0)


def test_a_slower_stage_slows_the_pipeline():
    assert timeline("1f1b", 2, 3, costs=Costs(stages=(1.0, 2.0))).makespan == 1 + 3 * 6 + 2


def program(*ranks):
    """Return lists of actions from texts such as 0SEND_F1; the peer is the other of two ranks."""
    lists = []
    for rank, words in enumerate(ranks):
        lists.append([])
        for word in words.split():
            kind = word.strip("0123456789")
            stage, microbatch = map(int, word.split(kind))
            lists[-1].append(Action(kind, stage, microbatch, 1 - rank if "_" in kind else None))
    return lists


NAIVE = program(
    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
)


def test_deadlock_of_messages_inserted_rank_by_rank():
    with pytest.raises(DeadlockError, match=r"0 at 0SEND_F1, 1 at 1SEND_B0"):
        simulate(NAIVE, blocking=True)
    assert simulate(NAIVE).makespan == 9  # both ranks send and receive in one batch


@pytest.mark.parametrize("blocking", [False, True])
def test_deadlock_of_a_receive_without_send(blocking):
    with pytest.raises(DeadlockError, match="1RECV_F0"):
        simulate(program("0F0", "1RECV_F0 1F0"), blocking=blocking)
