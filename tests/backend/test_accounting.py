"""Tests of communication accounting: bytes against the formulas, unchanged results, refused calls."""

import pytest
import torch

from megatron_lite.backend.accounting import counted, totals
from megatron_lite.backend.fake import FakeBackend
from megatron_lite.backend.group import LocalGroup
from megatron_lite.config.layout import partitions
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.errors import TrainingError

ROW = ((0, 1, 2, 3),)


def test_bytes_sent_are_those_of_a_ring():
    backend = FakeBackend(1, 4)
    group = backend.new_group("dp", ROW)
    x = torch.empty(8, 3, device="meta", dtype=torch.bfloat16)
    group.all_reduce_(x)
    group.all_reduce_(x, async_op=True).wait()
    assert group.all_gather(x).shape == (32, 3)
    assert group.reduce_scatter(x).shape == (2, 3)
    group.broadcast_(x)
    group.exchange([(x, 2)], [])
    group.exchange([], [(x, 0)])
    group.barrier()
    size = 8 * 3 * 2
    sent = {kind: (total.calls, total.size, total.sent) for (_, kind), total in totals(backend.traffic).items()}
    assert sent == {
        "all_reduce": (2, 2 * size, 2 * (2 * size * 3 // 4)),
        "all_gather": (1, 4 * size, 3 * size),
        "reduce_scatter": (1, size, size * 3 // 4),
        "broadcast": (1, size, size),
        "send": (1, size, size),
        "receive": (1, size, 0),
        "barrier": (1, 0, 0),
    }
    assert {axis for axis, _ in totals(backend.traffic)} == {"dp"}
    assert [transfer.peer for transfer in backend.traffic if transfer.peer is not None] == [2, 0]


def test_a_group_of_one_rank_sends_nothing():
    traffic = []
    group = LocalGroup("tp")
    assert counted(group, traffic) is group
    assert isinstance(FakeBackend(3, 4).new_group("tp", ((0, 1), (2,), (3,))), LocalGroup)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda group, x: group.all_reduce_(x.t()), "not contiguous"),
        (lambda group, x: group.all_gather_(x, x), "4 parts of 24 elements and a whole of 24"),
        (lambda group, x: group.reduce_scatter_(x[:4], x), "4 parts of 12 elements and a whole of 24"),
        (lambda group, x: group.all_gather_(x, x[:2].half()), "between torch.float32 and torch.float16"),
        (lambda group, x: group.exchange([(x, 4)], []), "a peer at coordinate 4 of 4"),
        (lambda group, x: group.exchange([(x, 1)], []), "to itself"),
    ],
)
def test_a_call_that_no_transport_can_do_is_an_error(call, message):
    group = FakeBackend(1, 4).new_group("dp", ROW)
    with pytest.raises(TrainingError, match=message):
        call(group, torch.empty(8, 3, device="meta"))


def test_a_fake_rank_has_the_coordinate_of_the_layout():
    parallel = ParallelConfig(world_size=512, tp=2, pp=4)
    group = FakeBackend(511, 512).new_group("pp", partitions("pp", parallel))
    assert (group.rank, group.size, group.ranks) == (3, 4, (127, 255, 383, 511))


def _counted_sums(backend):
    traffic = []
    group = counted(backend.new_group("dp", ((0, 1),)), traffic)
    x = torch.full((4,), float(group.rank + 1))
    group.all_reduce_(x)
    gathered = group.all_gather(torch.tensor([group.rank]))
    return x.tolist(), gathered.tolist(), group.all_gather_object("me"), len(traffic), group.process_group


def test_recording_leaves_results_unchanged(on_ranks):
    for sums, gathered, objects, calls, handle in on_ranks(2, _without_handle):
        assert (sums, gathered, objects, calls, handle) == ([3.0] * 4, [0, 1], ["me", "me"], 3, True)


def _without_handle(backend):
    *rest, handle = _counted_sums(backend)
    return *rest, handle is not None
