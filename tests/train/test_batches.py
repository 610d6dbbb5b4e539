"""Micro-batches of a run: tokens, labels, masks and document groups, by replica and curriculum length."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from megatron_lite.backend.cpu import CpuBackend
from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.data.serving.dataset import MockDataset
from megatron_lite.data.serving.loader import Loader
from megatron_lite.train.batches import BatchParts, RunData, batch_parts

EOD = 7
SAMPLES = (
    (1, 2, EOD, 3, EOD, EOD, EOD),
    (1, 2, 3, 4, 5, 6, 1),
    (1, 2, EOD, 3, 4, EOD, 5),
    (1, 2, 3, 4, 5, EOD, 6),  # the last input ends a document
)


class Written(MockDataset):
    """Dataset of SAMPLES."""

    def __init__(self):
        super().__init__(len(SAMPLES), len(SAMPLES[0]) - 1, EOD + 1, 0)

    def __getitem__(self, sample):
        return np.array(SAMPLES[sample])


def parts_of(*, first=True, last=True, positions="learned", **flags):
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, position_embedding=positions)
    batch = BatchConfig(seq_length=6, micro_batch_size=1)
    return batch_parts(RunConfig(model=model, batch=batch, data=DataConfig(**flags)), first=first, last=last)


def run_data(dataset=None, size=1, dp=1, replica=0, prefetch=0, backend=None, **flags):
    backend = backend or select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
    loader = Loader(
        dataset or Written(), micro_batch=size, global_batch=lambda consumed: size * dp, dp=dp, replica=replica
    )
    return RunData(backend, parts_of(**flags), EOD, prefetch, loader)


def reader(consumed=0, seq_length=6, **settings):
    data = run_data(**settings)
    return data.reader(data.train, consumed, seq_length)


def read(consumed, size, reset_attention_mask=True):
    return reader(consumed, size=size, reset_attention_mask=reset_attention_mask)(0)


def test_documents_are_grouped_by_length():
    batch = read(0, 3)
    assert batch.documents.groups == ((1, 1), (1, 2), (3, 3), (1, 6))
    parts = batch.documents.split(batch.tokens.t())
    assert [part.tolist() for part in parts] == [
        [[EOD]],
        [[3], [EOD]],
        [[1, 1, 3], [2, 2, 4], [EOD, EOD, EOD]],
        [[1], [2], [3], [4], [5], [6]],
    ]
    assert torch.equal(batch.documents.merge(parts, 6), batch.tokens.t())


@pytest.mark.parametrize(("consumed", "reset"), [(1, True), (3, True), (0, False)])
def test_no_documents_for_samples_of_one_document(consumed, reset):
    batch = read(consumed, 1, reset)
    assert batch.documents is None


class Blend(Written):
    """Blend of two alternating sources."""

    sources = ("one", "other")

    def source(self, sample):
        return sample % 2


def test_labels_are_the_next_tokens():
    batch = reader(size=2)(0)
    assert batch.tokens.tolist() == [list(sample[:-1]) for sample in SAMPLES[:2]]
    assert batch.labels.tolist() == [list(sample[1:]) for sample in SAMPLES[:2]]
    assert batch.loss_mask is None and batch.position_ids is None
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_curriculum_shortens_samples():
    batch = reader(0, 3, size=2)(0)
    assert batch.tokens.tolist() == [list(sample[:3]) for sample in SAMPLES[:2]]
    assert batch.labels.tolist() == [list(sample[1:4]) for sample in SAMPLES[:2]]


def test_each_flag_computes_its_tensor():
    masked = reader(2, eod_mask_loss=True)(0)
    assert masked.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0]] and masked.position_ids is None
    placed = reader(2, reset_position_ids=True)(0)
    assert placed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]] and placed.loss_mask is None
    apart = reader(2, reset_attention_mask=True)(0)
    assert apart.documents.groups == ((2, 3),) and apart.loss_mask is None


@pytest.mark.parametrize(("replica", "numbers", "sources"), [(0, [0, 2], (0, 0)), (1, [1, 3], (1, 1))])
def test_replicas_alternate_and_record_the_source_of_each_sample(replica, numbers, sources):
    read = reader(dataset=Blend(), dp=2, replica=replica)
    batches = [read(index) for index in (0, 1)]
    assert [batch.number for batch in batches] == numbers
    assert [batch.tokens.tolist() for batch in batches] == [[list(SAMPLES[number][:-1])] for number in numbers]
    assert tuple(batch.sources[0] for batch in batches) == sources


def test_sources_are_recorded_for_blends_only():
    assert reader(size=2)(0).sources is None
    assert reader(1, dataset=Blend(), size=3)(0).sources == (1, 0, 1)
    assert run_data(Blend()).train.names == ("one", "other")


class Long(Written):
    """Dataset of 100 samples."""

    def __len__(self):
        return 100


@dataclasses.dataclass
class Plan:
    first_sample: int
    global_batch: int
    seq_length: int = 6


def test_a_training_iteration_is_read_from_its_first_sample():
    assert run_data().train_reader(Plan(2, 1))(0).tokens.tolist() == [list(SAMPLES[2][:-1])]
    long = run_data(Long()).train
    assert long.list_samples(3, 8) == "3, 4, 5, 6, 7, 8, 9, 10"
    assert long.list_samples(3, 9) == "3, 4, 5, 6, 7, 8, 9, 10, …"


def test_skipped_positions_are_passed_over():
    loader = run_data(Long()).train
    assert loader.positions(2, 3) == loader.samples(2, 3) == [2, 3, 4]
    loader.skipped = ((3, 5),)
    assert loader.positions(2, 3) == loader.samples(2, 3) == [2, 5, 6]


class Recording(CpuBackend):
    """Backend that records the threads in which tensors are made in host memory and moved to the device."""

    def __init__(self):
        super().__init__(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
        self.calls = []

    def use_in_thread(self):
        self.note("begin")

    def host_tensor(self, array):
        self.note("host")
        return super().host_tensor(array)

    def to_device(self, tensor):
        self.note("move")
        return super().to_device(tensor)

    def note(self, kind):
        self.calls.append((kind, threading.current_thread() is threading.main_thread()))


def test_the_main_thread_only_moves_what_the_thread_made():
    backend, flags = Recording(), {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    data = run_data(Long(), prefetch=2, backend=backend, **flags)
    try:
        batches = [data.train_reader(Plan(start, 1))(0) for start in range(4)]
    finally:
        data.close()
    assert backend.calls.count(("begin", False)) == 1
    assert {call for call in backend.calls if call[0] != "begin"} == {("host", False), ("move", True)}
    alone = run_data(Long(), **flags)
    for start, batch in enumerate(batches):
        assert torch.equal(batch.tokens, alone.train_reader(Plan(start, 1))(0).tokens)


def test_a_rank_reads_what_its_stages_need():
    resets = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    assert parts_of(**resets) == BatchParts(True, True, True, True, True)
    assert parts_of(first=False, last=False) == BatchParts(False, False)
    assert not parts_of(first=False, last=False, eod_mask_loss=True, reset_position_ids=True).any
    assert parts_of(first=False, last=False, positions="rotary", **resets) == BatchParts(
        False, False, position_ids=True, documents=True
    )
    assert parts_of(last=False, **resets) == BatchParts(True, False, position_ids=True, documents=True)
    assert parts_of(first=False, **resets) == BatchParts(False, True, loss_mask=True, documents=True)
    assert not parts_of(positions="alibi", **resets).position_ids


class Unreadable(Long):
    """Dataset whose samples must not be read."""

    def __getitem__(self, sample):
        raise AssertionError("read")


def test_a_stage_in_the_middle_reads_nothing():
    batch = run_data(Unreadable(), size=2, dp=2, replica=1, first=False, last=False).train_reader(Plan(4, 4, 5))(1)
    assert batch.tokens is None and batch.labels is None
    assert batch.shape == (2, 5) and batch.number == 3
    with pytest.raises(AssertionError, match="read"):
        run_data(Unreadable(), last=False).train_reader(Plan(0, 1))(0)


@pytest.mark.parametrize("end", ["first", "last"])
def test_the_ends_get_their_own_tensors(end):
    batch = run_data(Blend(), **{"first": end == "first", "last": end == "last"}).train_reader(Plan(0, 1))(0)
    assert (batch.tokens is None, batch.labels is None) == (end == "last", end == "first")
    assert batch.sources == (None if end == "first" else (0,)) and batch.shape == (1, 6)
