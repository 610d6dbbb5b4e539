"""Cyclic sampler against Megatron's procedure with torch's permutation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.order import cyclic
from megatron_lite.data.order.cyclic import CyclicOrder, torch_permutation
from megatron_lite.errors import DataError


@settings(max_examples=40, deadline=None)
@given(size=st.integers(0, 3000), seed=st.integers(0, 10_000))
def test_permutation_is_torchs(size, seed):
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    assert torch_permutation(size, seed).tolist() == expected.tolist()


def test_a_permutation_of_several_chunks_is_torchs(monkeypatch):
    monkeypatch.setattr(cyclic, "CHUNK", 7)
    for size in (0, 1, 2, 7, 8, 9, 50):
        expected = torch.randperm(size, generator=torch.Generator().manual_seed(3))
        assert torch_permutation(size, 3).tolist() == expected.tolist()


def megatrons_sampler(size, consumed, micro_batch, replica, dp):
    """Yield the micro-batches of one replica within an epoch, as in Megatron."""
    active = size - size % (micro_batch * dp)
    epoch, inside = divmod(consumed, active)
    bucket = size // (micro_batch * dp) * micro_batch
    order = torch.randperm(bucket, generator=torch.Generator().manual_seed(epoch)).tolist()
    places = [replica * bucket + place for place in order[inside // dp :]]
    return [places[start : start + micro_batch] for start in range(0, len(places), micro_batch)]


@pytest.mark.parametrize("consumed", [0, 12, 96, 108])
def test_order_equals_megatrons(consumed):
    size, micro_batch, dp = 103, 2, 3
    order = CyclicOrder(size, micro_batch, dp)
    for replica in range(dp):
        for step, expected in enumerate(megatrons_sampler(size, consumed, micro_batch, replica, dp)):
            start = consumed + (step * dp + replica) * micro_batch
            assert [order[start + within] for within in range(micro_batch)] == expected


def test_every_sample_occurs_once_per_epoch():
    order = CyclicOrder(12, 2, 3)
    for epoch in range(4):
        assert sorted(order[12 * epoch + place] for place in range(12)) == list(range(12))


def test_fewer_than_one_micro_batch_per_replica_are_refused():
    with pytest.raises(DataError, match="cyclic"):
        CyclicOrder(5, 2, 3)
