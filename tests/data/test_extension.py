"""Datasets of an extended run: earlier samples keep their positions, additional ones follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig, DataGroup, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.order.set_plan import describe_set
from megatron_lite.data.serving.build import build_datasets, plan_datasets
from megatron_lite.data.serving.dataset import ConcatDataset, MockDataset
from megatron_lite.errors import DataError
from megatron_lite.schedules.data_order import DataSegment

LENGTH = 8


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    made = []
    for seed in range(2):
        rng = np.random.RandomState(seed)
        made.append(str(tmp_path_factory.mktemp("data") / f"part{seed}"))
        with IndexedDatasetWriter(made[-1], np.uint16) as writer:
            for size in rng.randint(1, 30, 60):
                writer.add_document(rng.randint(0, 50, size))
    return made


def config(data, **training):
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=100),
        batch=BatchConfig(seq_length=LENGTH, micro_batch_size=2, global_batch_size=4),
        training=TrainingConfig(**{"train_iters": 25, "eval_interval": 10, "eval_iters": 2, **training}),
        data=data,
    )


def kinds(prefixes):
    one, two = prefixes
    blend = (DataSource(path=one, weight=0.3), DataSource(path=two, weight=0.7))
    return {
        "single": DataConfig(sources=(DataSource(path=one),), split="8,1,1"),
        "modern": DataConfig(sources=(DataSource(path=one),), split="8,1,1", index_order="modern"),
        "blend": DataConfig(sources=blend, split="8,1,1"),
        "closed form": DataConfig(sources=blend, split="8,1,1", index_order="closed-form"),
        "slices": DataConfig(sources=blend, split="8,1,1", sampling="slice"),
        "groups": DataConfig(
            train_groups=(DataGroup(name="t", sources=blend),),
            valid_groups=(DataGroup(name="a", sources=blend[:1]), DataGroup(name="b", sources=blend)),
        ),
        "mock": DataConfig(mock=True),
    }


def spans(dataset, count):
    """Return the spans of a set's samples, or for --mock-data their tokens."""
    return [dataset.spans(number) or dataset[number].tolist() for number in range(count)]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["single", "modern", "blend", "closed form", "slices", "groups", "mock"]),
    requests=st.lists(st.integers(1, 700), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_an_extension_keeps_the_positions_of_earlier_samples(prefixes, kind, requests):
    data = kinds(prefixes)[kind]
    before = []
    for number in range(1, len(requests) + 1):
        asked = tuple(requests[:number])
        sets = build_datasets(config(data), DataSegment(train_requests=asked, valid_requests=asked))
        for dataset in (sets.train, *sets.valid.values()):
            assert len(dataset) >= asked[-1]
        read = [spans(sets.train, asked[-1]), *(spans(dataset, asked[-1]) for dataset in sets.valid.values())]
        assert all(now[: len(then)] == then for now, then in zip(read, before, strict=False))
        before = read


def test_additional_samples_have_another_order(prefixes):
    plan = plan_datasets(config(kinds(prefixes)["single"]), DataSegment(train_requests=(10, 250)))["train"]["train"]
    first, second = plan.sources[0].indices
    assert (first.num_samples, second.num_samples) == (10, 250 - first.total_samples)
    assert first.seed != second.seed
    assert plan.size == 250
    assert plan_datasets(config(kinds(prefixes)["single"]), DataSegment(train_requests=(10, first.total_samples)))[
        "train"
    ]["train"].sources[0].indices == (first,)


def test_without_weights_validation_has_one_epoch_and_longer_training_is_refused(prefixes):
    sources = tuple(DataSource(path=path) for path in prefixes)
    data = DataConfig(sources=sources, split="5,5,0")
    sets = build_datasets(config(data), DataSegment(train_requests=(20,), valid_requests=(10_000,)))
    plan = sets.plans["valid"]["valid"]
    assert len(sets.valid["valid"]) == plan.size == sum(source.size for source in plan.sources) < 10_000
    with pytest.raises(DataError, match="read once"):
        build_datasets(config(data), DataSegment(train_requests=(20, 10_000)))


def test_a_run_that_only_evaluates_opens_no_training_data(prefixes):
    one = prefixes[0]
    data = DataConfig(train_groups=(DataGroup(name="t", sources=(DataSource(path="absent"),)),))
    data = replace(data, valid_groups=(DataGroup(name="v", sources=(DataSource(path=one),)),))
    sets = build_datasets(config(data, skip_train=True))
    assert sets.train is None
    assert list(sets.valid) == ["v"]


def test_epochs_are_described_for_sources_read_more_than_once(prefixes):
    plans = plan_datasets(config(kinds(prefixes)["blend"]), DataSegment(train_requests=(240,), valid_requests=(3,)))
    (one, two), plan = plans["train"]["train"].epochs, plans["train"]["train"]
    tokens = [source.indices[0].tokens_per_epoch for source in plan.sources]
    assert (one, two) == pytest.approx((240 * 0.3 * LENGTH / tokens[0], 240 * 0.7 * LENGTH / tokens[1]))
    assert one < 1 < two
    assert describe_set(plan, ("a", "b"), 4) == f"240 samples of a, b ({two:.1f} epochs)"
    assert describe_set(plan, ("a", "b"), 1) == f"240 samples of a and 1 more (up to {two:.1f} epochs)"
    mock = plan_datasets(config(kinds(prefixes)["mock"]))["train"]["train"]
    assert describe_set(mock, ("mock",), 4) == "100 samples of mock"


def test_concatenated_datasets():
    parts = [MockDataset(size, 4, 50, seed) for seed, size in enumerate((3, 1, 5))]
    joined = ConcatDataset(parts)
    assert len(joined) == 9
    assert joined.sources == ("mock",)
    expected = [part[number].tolist() for part in parts for number in range(len(part))]
    assert [joined[number].tolist() for number in range(9)] == expected
    assert [joined.source(number) for number in range(9)] == [0] * 9
    for outside in (-1, 9):
        with pytest.raises(DataError, match="the index of this run has the samples"):
            joined[outside]
