"""Tests of collectives on gloo ranks, and of a rank that fails."""

import datetime

import pytest
import torch
import torch.distributed as dist

from megatron_lite.backend.cuda import CudaBackend
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


def communicators(backend):
    spanning = (tuple(range(backend.world_size)),)
    groups = [backend.new_group(axis, spanning).process_group for axis in ("world", "dp", "tp")]
    descriptions = [group.group_desc for group in groups[1:]]
    return [group is dist.group.WORLD for group in groups], len({id(group) for group in groups}), descriptions


def test_an_axis_that_spans_all_ranks_has_a_communicator_of_its_own(on_ranks):
    assert on_ranks(2, communicators) == [([True, False, False], 3, ["dp", "tp"])] * 2


class NcclOptions:
    """Stand-in for ProcessGroupNCCL.Options, which builds of torch for CPUs lack."""

    def __init__(self, is_high_priority_stream=False):
        self.high_priority = is_high_priority_stream


@pytest.fixture
def nccl(monkeypatch):
    """A CUDA backend of rank 1 of 8 without a device, and the recorded calls that create groups."""
    calls = []

    def split_group(parent_pg=None, split_ranks=None, timeout=None, pg_options=None, group_desc=None, backend=None):
        calls.append(("split", split_ranks, timeout, pg_options, group_desc, backend))
        return "group"

    def new_group(ranks=None, timeout=None, backend=None, pg_options=None, group_desc=None):
        calls.append(("new", ranks, timeout, pg_options, group_desc, backend))
        return "group"

    monkeypatch.setattr(dist, "ProcessGroupNCCL", type("ProcessGroupNCCL", (), {"Options": NcclOptions}), raising=False)
    monkeypatch.setattr(dist, "split_group", split_group)
    monkeypatch.setattr(dist, "new_group", new_group)
    backend = object.__new__(CudaBackend)
    backend.rank, backend.world_size, backend._timeout = 1, 8, datetime.timedelta(minutes=3)
    return backend, calls


@pytest.mark.parametrize(("axis", "high_priority"), [("tp", True), ("pp", True), ("dp", False), ("embedding", False)])
def test_nccl_groups_of_an_axis_are_one_split_with_priority_and_timeout(nccl, axis, high_priority):
    backend, calls = nccl
    group = backend.new_group(axis, ((0, 1), (2,), (3, 4, 5), (6, 7)))
    ((kind, rows, timeout, options, description, transport),) = calls
    assert (kind, rows, description, transport) == ("split", [[0, 1], [3, 4, 5], [6, 7]], axis, "cuda:nccl")
    assert timeout == options._timeout == datetime.timedelta(minutes=3)
    assert options.high_priority is high_priority
    assert group.process_group == "group" and group.ranks == (0, 1)


def test_older_versions_of_torch_create_the_groups_one_by_one(nccl, monkeypatch):
    backend, calls = nccl
    monkeypatch.setattr(dist, "split_group", lambda parent_pg=None, split_ranks=None: None)
    assert backend.new_group("tp", ((0, 1), (2,), (3, 4))).process_group == "group"
    assert [call[:2] for call in calls] == [("new", [0, 1]), ("new", [3, 4])]
    assert {call[4:] for call in calls} == {("tp", "nccl")} and all(call[3].high_priority for call in calls)


def test_a_rank_alone_on_an_axis_takes_part_in_the_others_groups(nccl):
    backend, calls = nccl
    backend.rank = 2
    assert backend.new_group("embedding", ((0, 1), (2,))).size == 1
    assert len(calls) == 1


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
