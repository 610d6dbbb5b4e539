"""What a batch source makes of tokens: where documents end, found before anything is on a device."""

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
from megatron_lite.train.batches import BatchSource, RunData

EOD = 7
SAMPLES = (
    (1, 2, EOD, 3, EOD, EOD, EOD),
    (1, 2, 3, 4, 5, 6, 1),
    (1, 2, EOD, 3, 4, EOD, 5),
    (1, 2, 3, 4, 5, EOD, 6),  # the last input ends a document, and none begins behind it
)


class Written(MockDataset):
    """The samples above."""

    def __init__(self):
        super().__init__(len(SAMPLES), len(SAMPLES[0]) - 1, EOD + 1, 0)

    def __getitem__(self, sample):
        return np.array(SAMPLES[sample])


def source(dataset=None, size=1, dp=1, replica=0, **flags):
    backend = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
    loader = Loader(
        dataset or Written(),
        micro_batch=size,
        global_batch=lambda consumed: size * dp,
        dp=dp,
        replica=replica,
        prefetch=0,
    )
    return BatchSource(loader, backend, dataclasses.replace(DataConfig(), **flags), EOD)


def read(consumed, size, reset_attention_mask=True):
    return source(size=size, reset_attention_mask=reset_attention_mask).reader_at(consumed, 6)(0)


def test_documents_are_grouped_by_their_length():
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
def test_nothing_where_there_is_nothing_to_keep_apart(consumed, reset):
    batch = read(consumed, 1, reset)
    assert batch.documents is None


class Blend(Written):
    """Two sources, in turn."""

    sources = ("one", "other")

    def source(self, sample):
        return sample % 2


def test_labels_are_the_tokens_that_follow():
    batch = source(size=2).reader_at(0, 6)(0)
    assert batch.tokens.tolist() == [list(sample[:-1]) for sample in SAMPLES[:2]]
    assert batch.labels.tolist() == [list(sample[1:]) for sample in SAMPLES[:2]]
    assert batch.loss_mask is None and batch.position_ids is None
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_a_curriculum_cuts_samples_short():
    batch = source(size=2).reader_at(0, 3)(0)
    assert batch.tokens.tolist() == [list(sample[:3]) for sample in SAMPLES[:2]]
    assert batch.labels.tolist() == [list(sample[1:4]) for sample in SAMPLES[:2]]


def test_each_flag_makes_its_own_tensor():
    masked = source(eod_mask_loss=True).reader_at(2, 6)(0)
    assert masked.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0]] and masked.position_ids is None
    placed = source(reset_position_ids=True).reader_at(2, 6)(0)
    assert placed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]] and placed.loss_mask is None
    apart = source(reset_attention_mask=True).reader_at(2, 6)(0)
    assert apart.documents.groups == ((2, 3),) and apart.loss_mask is None


@pytest.mark.parametrize(("replica", "numbers", "sources"), [(0, [0, 2], (0, 0)), (1, [1, 3], (1, 1))])
def test_replicas_take_turns_and_name_the_source_of_each_sample(replica, numbers, sources):
    read = source(Blend(), dp=2, replica=replica).reader_at(0, 6)
    batches = [read(index) for index in (0, 1)]
    assert [batch.number for batch in batches] == numbers
    assert [batch.tokens.tolist() for batch in batches] == [[list(SAMPLES[number][:-1])] for number in numbers]
    assert tuple(batch.sources[0] for batch in batches) == sources


def test_one_source_is_not_named():
    assert source(size=2).reader_at(0, 6)(0).sources is None
    assert source(Blend(), size=3).reader_at(1, 6)(0).sources == (1, 0, 1)
    assert source(Blend()).by_source({1: 2.5, 0: 1.5}) == {"other": 2.5, "one": 1.5}


class Long(Written):
    """As many samples as are asked for."""

    def __len__(self):
        return 100


@dataclasses.dataclass
class Plan:
    first_sample: int
    global_batch: int
    seq_length: int = 6


def test_a_plan_is_read_from_its_first_sample_and_described_by_its_numbers():
    assert source().reader(Plan(2, 1))(0).tokens.tolist() == [list(SAMPLES[2][:-1])]
    long = source(Long())
    assert long.describe(Plan(3, 8)) == "3, 4, 5, 6, 7, 8, 9, 10"
    assert long.describe(Plan(3, 9)) == "3, 4, 5, 6, 7, 8, 9, 10, …"


def test_places_that_are_left_out_are_passed_over():
    long = source(Long())
    assert long.places(2, 3) == long.numbers(2, 3) == [2, 3, 4]
    long.leave_out(((3, 5),))
    assert long.places(2, 3) == long.numbers(2, 3) == [2, 5, 6]


def test_closing_the_data_of_a_run_closes_every_loader_once():
    closed = []

    class Closing:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)

    RunData(Closing("train"), {"v": Closing("valid")}, {"t": Closing("test")}).close()
    assert closed == ["train", "valid", "test"]
    RunData().close()
    loader = source()
    loader._loader.close = lambda: closed.append("loader")
    loader.close()
    assert closed[3:] == ["loader"]
