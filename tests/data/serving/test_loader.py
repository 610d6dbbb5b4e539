"""Loader as a function of consumed samples: equal tokens in any order, for any replicas, at any read-ahead."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest

from megatron_lite.data.order.cyclic import CyclicOrder
from megatron_lite.data.serving.dataset import MockDataset
from megatron_lite.data.serving.loader import Loader
from megatron_lite.data.serving.read_ahead import Place, ReadAhead
from megatron_lite.errors import DataError
from megatron_lite.schedules.microbatches import num_microbatches

LENGTH = 4


class Counting(MockDataset):
    """Dataset that records its reads; sample `bad` is damaged."""

    def __init__(self, size=1000, bad=None):
        super().__init__(size, LENGTH, 50, 3)
        self.read = []
        self.bad = bad

    def __getitem__(self, sample):
        self.read.append((threading.current_thread() is threading.main_thread(), sample))
        if sample == self.bad:
            raise DataError("damaged: sample", fix="none")
        return np.full(LENGTH + 1, sample, dtype=np.int64)


def ramp(consumed):
    return 2 if consumed < 8 else 6


def one(consumed):
    return 1


@contextmanager
def reading(dataset, depth, **options):
    """A loader, and a function that reads its micro-batches with `depth` of them ahead."""
    loader = Loader(dataset, **options)
    ahead = ReadAhead(lambda place: loader.microbatch(*place), loader.following, depth)
    try:
        yield lambda consumed, index=0, length=LENGTH: ahead(Place(consumed, index, length))
    finally:
        ahead.close()


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_all_replicas_together_read_every_sample_once_in_order(depth, dp):
    dataset = Counting()
    seen = {}
    for replica in range(dp):
        with reading(dataset, depth, micro_batch=2, global_batch=ramp, dp=dp, replica=replica) as read:
            consumed = 0
            for _ in range(8):
                for index in range(num_microbatches(ramp(consumed), 2, dp, replica)):
                    tokens = read(consumed, index)
                    assert tokens.shape == (2, LENGTH + 1)
                    seen.setdefault(consumed, []).extend(tokens[:, 0].tolist())
                consumed += ramp(consumed)
    starts = sorted(seen)
    assert starts == [0, 2, 4, 6, 8, 14, 20, 26]
    assert all(sorted(seen[start]) == list(range(start, start + ramp(start))) for start in starts)


def test_each_sample_is_read_once_and_in_the_thread():
    dataset = Counting()
    with reading(dataset, 3, micro_batch=1, global_batch=one) as read:
        for consumed in range(50):
            assert read(consumed)[0, 0] == consumed
    samples = [sample for _, sample in dataset.read]
    assert samples == sorted(set(samples))
    assert not any(in_main for in_main, _ in dataset.read)


def test_random_access():
    with reading(Counting(), 2, micro_batch=2, global_batch=ramp) as read:
        for consumed in (0, 500, 8, 8, 2, 502):
            assert read(consumed)[:, 0].tolist() == [consumed, consumed + 1]


def test_a_new_length_is_read_again():
    dataset = Counting()
    with reading(dataset, 2, micro_batch=2, global_batch=ramp) as read:
        assert [read(0, 0, 2).shape, read(2, 0, 2).shape, read(4).shape, read(6).shape] == [(2, 3)] * 2 + [(2, 5)] * 2


def test_an_error_in_the_thread_reaches_the_caller_and_later_reads_succeed():
    with reading(Counting(bad=13), 4, micro_batch=1, global_batch=one) as read:
        for consumed in range(13):
            read(consumed)
        with pytest.raises(DataError, match="damaged"):
            read(13)
        assert read(14)[0, 0] == 14


def test_reading_ahead_past_the_end_is_no_error():
    with reading(Counting(size=4, bad=4), 3, micro_batch=1, global_batch=one) as read:
        for consumed in range(4):
            read(consumed)


def test_close_ends_the_thread_and_allows_reads():
    before, begun = threading.active_count(), []
    loader = Loader(Counting(), micro_batch=1, global_batch=one)
    ahead = ReadAhead(
        lambda place: loader.microbatch(*place), loader.following, 2, lambda: begun.append(threading.current_thread())
    )
    ahead(Place(0, 0, LENGTH))
    assert threading.active_count() == before + 1 and begun[0] is not threading.main_thread()
    ahead.close()
    ahead.close()
    assert threading.active_count() == before and len(begun) == 1
    assert ahead(Place(1, 0, LENGTH))[0, 0] == 1


def test_a_replica_without_micro_batches_does_not_hang():
    with reading(Counting(), 2, micro_batch=1, global_batch=one, dp=2, replica=1) as read:
        assert read(0)[0, 0] == 1


def test_validation_restarts_at_the_end_of_its_data():
    loader = Loader(Counting(size=10), micro_batch=4, global_batch=lambda consumed: 4, repeats=True)
    assert loader.microbatch(1608, 0)[:, 0].tolist() == [8, 9, 0, 1]
    assert loader.samples(8, 4) == [8, 9, 0, 1]


@pytest.mark.parametrize("dp", [1, 3])
def test_the_cyclic_order_of_another_layout_can_be_read(dp):
    """The order belongs to the run; the current replicas divide it among themselves."""
    read = {}
    for replica in range(dp):
        options = {"micro_batch": 2, "global_batch": lambda consumed: 6, "cyclic_layout": (3, 2)}
        loader = Loader(Counting(size=26), dp=dp, replica=replica, **options)
        for consumed in range(0, 24, 6):
            for index in range(num_microbatches(6, 2, dp, replica)):
                read[loader.start(consumed, index)] = loader.microbatch(consumed, index)[:, 0].tolist()
    samples = [sample for start in sorted(read) for sample in read[start]]
    order = CyclicOrder(26, 3, 2)
    assert samples == [order[place] for place in range(24)]
    assert len(set(samples)) == 24


def test_cyclic_reads_epoch_after_epoch():
    loader = Loader(Counting(size=6), micro_batch=2, global_batch=lambda consumed: 2, cyclic_layout=(2, 1))
    for epoch in range(3):
        seen = [loader.microbatch(epoch * 6 + step, 0)[:, 0].tolist() for step in (0, 2, 4)]
        assert sorted(sum(seen, [])) == list(range(6))  # noqa: RUF017
    assert loader.samples(0, 6) == loader.read(0, 6)[:, 0].tolist()
    assert loader.sources(0, 3).tolist() == [0, 0, 0]
