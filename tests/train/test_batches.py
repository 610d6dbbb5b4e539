"""Micro-batches of a run: tokens, labels, masks and document groups, by replica and curriculum length."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.data import DataConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.data.serving.dataset import MockDataset
from megatron_lite.data.serving.loader import Loader
from megatron_lite.train.batches import RunData

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


def run_data(dataset=None, size=1, dp=1, replica=0, **flags):
    backend = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
    loader = Loader(
        dataset or Written(),
        micro_batch=size,
        global_batch=lambda consumed: size * dp,
        dp=dp,
        replica=replica,
        prefetch=0,
    )
    return RunData(backend, dataclasses.replace(DataConfig(), **flags), EOD, loader)


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


def test_close_closes_every_loader_once():
    closed = []

    class Closing:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)

    RunData(None, DataConfig(), EOD, Closing("train"), {"v": Closing("valid")}, {"t": Closing("test")}).close()
    assert closed == ["train", "valid", "test"]
    RunData(None, DataConfig(), EOD).close()
