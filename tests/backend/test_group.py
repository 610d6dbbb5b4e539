"""Tests of collectives on gloo ranks, and of a rank that fails."""

import pytest
import torch

from megatron_lite.config.layout import partitions
from megatron_lite.config.parallel import ParallelConfig


def collectives(backend):
    group = backend.new_group("dp", partitions("dp", ParallelConfig(world_size=4, tp=2)))
    mine = torch.full((2, 3), float(backend.rank))
    summed = mine.clone()
    work = group.all_reduce_(summed, async_op=True)
    work.wait()
    highest = mine.clone()
    group.all_reduce_(highest, op="max")
    sent = mine.clone()
    group.broadcast_(sent, src_coordinate=1)
    received = torch.empty(2, 3)
    peer = 1 - group.rank
    for transfer in group.exchange([(mine, peer)], [(received, peer)]):
        transfer.wait()
    inside = torch.zeros(4, 3)
    inside.view(2, 2, 3)[group.rank] = mine
    group.all_gather_(inside, inside.view(2, 2, 3)[group.rank])
    group.barrier()
    return {
        "coordinate": (group.rank, group.size, group.ranks),
        "sum": summed,
        "max": highest,
        "inside": inside,
        "gathered": group.all_gather(mine),
        "scattered": group.reduce_scatter(torch.arange(4.0) + backend.rank),
        "broadcast": sent,
        "received": received,
        "objects": group.all_gather_object(f"rank {backend.rank}"),
    }


def test_collectives_run_along_one_axis(on_ranks):
    for rank, got in enumerate(on_ranks(4, collectives)):
        row = (rank % 2, rank % 2 + 2)
        low, high = (torch.full((2, 3), float(r)) for r in row)
        assert got["coordinate"] == (rank // 2, 2, row)
        assert torch.equal(got["sum"], low + high)
        assert torch.equal(got["max"], high)
        assert torch.equal(got["gathered"], torch.cat((low, high)))
        assert torch.equal(got["inside"], torch.cat((low, high)))
        assert torch.equal(got["scattered"], (2 * torch.arange(4.0) + sum(row)).chunk(2)[rank // 2])
        assert torch.equal(got["broadcast"], high)
        assert torch.equal(got["received"], low if rank // 2 else high)
        assert got["objects"] == [f"rank {r}" for r in row]


def timeouts(backend):
    groups = [backend.new_group("dp", partition) for partition in (((0, 1), (2, 3)), ((0, 1, 2, 3),))]
    handles = [group.process_group._get_backend(torch.device("cpu")) for group in groups]
    return [handle.options._timeout.total_seconds() for handle in handles]


def test_every_group_has_the_timeout_of_the_job(on_ranks):
    """The timeout of four minutes is set in support/ranks.py."""
    assert on_ranks(4, timeouts) == [[240.0, 240.0]] * 4


def fail_on(backend, rank):
    if backend.rank == rank:
        raise ValueError("this rank fails")
    backend.new_group("world", (tuple(range(backend.world_size)),)).barrier()


def rank_of(backend):
    return backend.rank


@pytest.mark.slow
def test_a_failed_rank_is_reported_and_the_next_test_gets_new_ranks(on_ranks):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*this rank fails") as caught:
        on_ranks(2, fail_on, 1)
    assert "ValueError" in str(caught.value)
    assert on_ranks(2, rank_of) == [0, 1]
