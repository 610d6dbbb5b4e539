"""Closed-form sample order: every token once an epoch, no file written, resume, damaged files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.format import indexed_dataset
from megatron_lite.data.format.index_format import bin_path, idx_path, pack_header
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.serving.closed_form import ClosedFormDataset
from megatron_lite.data.serving.loader import Loader
from megatron_lite.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("closed_form")


def write(prefix, sizes):
    """Write a dataset whose token i is i; sequences may be empty, as in datasets of other tools."""
    total = sum(sizes)
    pointers = 4 * (np.cumsum(sizes) - sizes)
    idx_path(prefix).write_bytes(
        pack_header(np.dtype("<i4"), len(sizes), len(sizes) + 1)
        + np.array(sizes, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    )
    bin_path(prefix).write_bytes(np.arange(total, dtype="<i4").tobytes())
    return IndexedDataset(prefix)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    cut=st.tuples(st.integers(0, 39), st.integers(1, 40)),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_epoch_reads_each_range_of_the_split_once(folder, sizes, cut, length, seed):
    data = write(folder / "corpus", sizes)
    first, last = sorted(min(bound, len(sizes)) for bound in cut)
    tokens = list(range(sum(sizes[:first]), sum(sizes[:last])))
    if len(tokens) <= length:
        with pytest.raises(DataError, match=f"hold {len(tokens)} tokens, less than one sample of {length}"):
            ClosedFormDataset(data, (first, last), None, length, seed)
        return
    epoch = len(ClosedFormDataset(data, (first, last), None, length, seed))
    assert epoch == (len(tokens) - 1) // length
    dataset = ClosedFormDataset(data, (first, last), 3 * epoch, length, seed)
    ranges = [tokens[start : start + length + 1] for start in range(0, epoch * length, length)]
    for start in (0, epoch, 2 * epoch):
        samples = [dataset[sample].tolist() for sample in range(start, start + epoch)]
        assert sorted(samples) == ranges
        for sample, found in enumerate(samples, start):
            parts = [data.get(*span) for _, span in dataset.spans(sample)]
            assert np.concatenate(parts).tolist() == found
            assert all(first <= span[0] < last for _, span in dataset.spans(sample))


def test_epochs_and_seeds_have_other_orders(tmp_path):
    data = write(tmp_path / "corpus", [100] * 9)
    orders = {
        tuple(ClosedFormDataset(data, (0, 9), 1000, 8, seed)[start + sample][0] for sample in range(112))
        for seed in (1, 2)
        for start in (0, 112, 224)
    }
    assert len(orders) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"], "no index is written"


def test_the_order_does_not_depend_on_replicas_or_requests(tmp_path):
    data = write(tmp_path / "corpus", [37] * 20)

    def read(requested, dp):
        dataset = ClosedFormDataset(data, (0, 20), requested, 8, 1)
        loaders = [
            Loader(dataset, micro_batch=2, global_batch=lambda _: 8, dp=dp, replica=replica) for replica in range(dp)
        ]
        return [
            loader.microbatch(consumed, index).tolist()
            for consumed in range(0, 160, 8)
            for index in range(4 // dp)
            for loader in loaders
        ]

    assert read(160, 1) == read(160, 2) == read(500, 4)


def test_a_damaged_index_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "EAGER", 0)
    monkeypatch.setattr(indexed_dataset, "BLOCK", 4)
    write(tmp_path / "corpus", [10] * 40)

    def damage(sequence, size):
        content = bytearray(idx_path(tmp_path / "corpus").read_bytes())
        content[34 + 4 * sequence : 38 + 4 * sequence] = np.array([size], "<i4").tobytes()
        idx_path(tmp_path / "corpus").write_bytes(content)
        return IndexedDataset(tmp_path / "corpus")

    data = damage(20, 3)
    dataset = ClosedFormDataset(data, (0, 40), None, 8, 1)
    failed = set()
    for sample in range(len(dataset)):
        try:
            tokens = dataset[sample].tolist()
        except DataError as error:  # noqa: PERF203
            failed.add(str(error).partition(": ")[2].partition(". ")[0])
        else:
            assert tokens == list(range(tokens[0], tokens[0] + 9))
    assert failed == {"sequence 20 ends at byte 812, the next begins at 840"}
    with pytest.raises(DataError, match="sequence 20 ends at byte"):
        IndexedDataset(tmp_path / "corpus").count_tokens(0, 21)
