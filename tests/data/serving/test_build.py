"""Dataset construction: splits, groups, blends, sample counts and errors."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig, DataGroup, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.serving.build import blend_counts, build_datasets
from megatron_lite.data.serving.dataset import short_names
from megatron_lite.errors import DataError

LENGTH = 8


def write(prefix, documents=200, low=0, high=50, seed=0):
    rng = np.random.RandomState(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for size in rng.randint(1, 30, documents):
            writer.add_document(rng.randint(low, high, size))
    return str(prefix)


def config(data, **training):
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=100),
        batch=BatchConfig(seq_length=LENGTH, micro_batch_size=2, global_batch_size=4),
        training=TrainingConfig(**{"train_iters": 25, "eval_interval": 10, "eval_iters": 2, **training}),
        data=data,
    )


def sequences(dataset):
    """Return the sequences of a dataset's samples."""
    return {span[0] for sample in range(len(dataset)) for _, span in dataset.spans(sample)}


@pytest.mark.parametrize("order", [{}, {"sampling": "slice"}, {"index_order": "closed-form"}])
def test_splits_divide_the_documents(tmp_path, order):
    prefix = write(tmp_path / "a")
    sets = build_datasets(config(DataConfig(sources=(DataSource(path=prefix),), split="8,1,1", **order)))
    assert len(sets.train) >= 100
    assert len(sets.valid["valid"]) >= (25 // 10 + 1) * 2 * 4
    assert sequences(sets.train) <= set(range(160))
    assert sequences(sets.valid["valid"]) <= set(range(160, 180))
    assert sequences(sets.test["test"]) <= set(range(180, 200))
    sample = sets.train[3]
    assert sample.dtype == np.int64
    data = IndexedDataset(prefix)
    expected = [data.get(*span) for _, span in sets.train.spans(3)]
    assert sample.tolist() == np.concatenate(expected).tolist()
    assert sample.shape == (LENGTH + 1,)


def test_a_set_without_documents_is_left_out(tmp_path):
    source = DataSource(path=write(tmp_path / "a"))
    sets = build_datasets(config(DataConfig(sources=(source,), split="1,0,0")))
    assert (sets.valid, sets.test) == ({}, {})
    assert "no documents to valid" in str(sets.notices.warnings)
    with pytest.raises(DataError, match="no documents to train on"):
        build_datasets(config(DataConfig(sources=(source,), split="0,1,0")))
    assert build_datasets(config(DataConfig(sources=(source,)), eval_iters=0)).valid == {}


@pytest.mark.parametrize("order", ["legacy", "modern", "closed-form"])
def test_a_blend_follows_its_weights(tmp_path, order):
    paths = [write(tmp_path / "a", low=0, high=10), write(tmp_path / "b", low=50, high=60, seed=1)]
    sources = (DataSource(path=paths[0], weight=3.0), DataSource(path=paths[1], weight=1.0))
    train = build_datasets(config(DataConfig(sources=sources, index_order=order))).train
    assert len(train) == 100
    from_b = [train.source(sample) for sample in range(100)]
    assert sum(from_b) == 25
    assert all((train[sample].min() >= 50) == bool(source) for sample, source in enumerate(from_b))
    assert train.sources == ("a", "b")


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["/data/en/text", "/data/fr/text"], ("en/text", "fr/text")),
        (["/data/en", "/data/en", "/data/fr", "/data/en"], ("en (1)", "en (2)", "fr", "en (3)")),
        (["/data/en/text", "fr"], ("/data/en/text", "fr")),
        (["/data/en", "/data/en/deep"], ("en", "en/deep")),
        (["a"], ("a",)),
    ],
)
def test_sources_of_a_blend_have_unique_short_names(prefixes, names):
    """Losses are logged by name, so two ranges of one file need two names."""
    assert short_names(prefixes) == names


def test_sources_without_weights_are_read_once(tmp_path):
    sources = tuple(DataSource(path=write(tmp_path / name, seed=seed)) for seed, name in enumerate("ab"))
    data = DataConfig(sources=sources, split="1")
    train = build_datasets(config(data, eval_iters=0)).train
    assert {train.source(sample) for sample in range(100)} == {0, 1}
    with pytest.raises(DataError, match="read once"):
        build_datasets(config(data, eval_iters=0, train_iters=100_000))


def test_groups_of_ranges(tmp_path):
    prefix = write(tmp_path / "a")

    def group(name, start, end):
        return DataGroup(name=name, sources=(DataSource(path=prefix, weight=1.0, start=start, end=end),))

    data = DataConfig(
        train_groups=(group("TRAIN", 0.0, 0.9),), valid_groups=(group("early", 0.9, 0.95), group("late", 0.95, 1.0))
    )
    sets = build_datasets(config(data))
    assert sequences(sets.train) <= set(range(180))
    assert sequences(sets.valid["early"]) <= set(range(180, 190))
    assert sequences(sets.valid["late"]) <= set(range(190, 200))
    assert sets.test == {}


@pytest.mark.parametrize("order", ["legacy", "modern", "closed-form"])
def test_a_source_without_documents_for_a_split_is_left_out_of_it(tmp_path, order):
    paths = [write(tmp_path / "a"), write(tmp_path / "b", documents=2), write(tmp_path / "c", seed=1)]
    sources = tuple(DataSource(path=path, weight=weight) for path, weight in zip(paths, (1.0, 2.0, 3.0), strict=True))
    sets = build_datasets(config(DataConfig(sources=sources, index_order=order)))
    assert sets.train.sources == ("a", "b", "c")
    assert sets.valid["valid"].sources == ("a", "c")
    assert sum(sets.valid["valid"].source(sample) for sample in range(24)) == 18, "weights 1 and 3 of 4"
    assert f"{paths[1]} (2 sequences) is too small to give the valid set a document" in str(sets.notices.warnings)
    assert "for train" not in str(sets.notices.warnings)


def test_a_set_for_which_no_source_has_documents(tmp_path):
    empty, full = write(tmp_path / "a", documents=2), write(tmp_path / "b")
    sources = (DataSource(path=empty, weight=1.0), DataSource(path=full, weight=0.0))
    sets = build_datasets(config(DataConfig(sources=sources)))
    assert sets.train.sources == ("a",)
    assert (sets.valid, sets.test) == ({}, {})
    assert "assigns no documents to valid" in str(sets.notices.warnings)
    late = DataGroup(name="late", sources=(DataSource(path=empty, weight=1.0, start=0.9, end=1.0),) * 2)
    with pytest.raises(
        DataError, match=r'The set "late" gets nothing of the dataset .*: its share 0.9:1 of 2 sequences rounds to none'
    ):
        build_datasets(config(DataConfig(sources=sources, valid_groups=(late,))))


@pytest.mark.parametrize("order", ["legacy", "modern"])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0, 1.0), (0.3, 0.0, 0.1, 0.7, 0.2, 0.9, 0.0, 0.4, 1.1, 0.6)])
def test_a_source_of_weight_zero_is_left_out(tmp_path, order, weights):
    """Megatron's rule could select it, because its error of 0 may be the largest."""
    paths = [write(tmp_path / f"s{number}", seed=number) for number in range(len(weights))]
    given = [DataSource(path=path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
    train = build_datasets(config(DataConfig(sources=tuple(given), index_order=order))).train
    kept = [source for source in given if source.weight]
    alone = build_datasets(config(DataConfig(sources=tuple(kept), index_order=order))).train
    assert train.sources == alone.sources
    assert [train.spans(sample) for sample in range(100)] == [alone.spans(sample) for sample in range(100)]


@pytest.mark.parametrize("first", [200, 99])
def test_an_id_outside_the_vocabulary_is_refused_at_the_start(tmp_path, first):
    prefix = write(tmp_path / "a", low=first, high=first + 2)
    with pytest.raises(DataError, match=r"the vocabulary has 100"):
        build_datasets(config(DataConfig(sources=(DataSource(path=prefix),))))


def test_an_id_missed_at_the_start_is_refused_when_it_is_read(tmp_path, monkeypatch):
    prefix = write(tmp_path / "a", low=200, high=201)
    monkeypatch.setattr("megatron_lite.data.serving.build.check_vocabulary", lambda *_: None)
    train = build_datasets(config(DataConfig(sources=(DataSource(path=prefix),)))).train
    with pytest.raises(DataError, match=r"contains token id 200 \(sequence \d+"):
        train[0]


def test_a_sample_past_the_end_is_refused(tmp_path):
    sources = (DataSource(path=write(tmp_path / "a"), weight=1.0),)
    for data in (DataConfig(sources=sources), DataConfig(sources=sources, sampling="slice")):
        train = build_datasets(config(data)).train
        with pytest.raises(DataError, match="the index of this run has the samples 0 to 99"):
            train[len(train)]


def piece(path):
    """Return size and checksum of a file as a manifest's only piece."""
    return path.stat().st_size, zlib.crc32(path.read_bytes())


def test_a_dataset_of_another_tokenizer_is_refused(tmp_path):
    from megatron_lite.data.format.manifest import DatasetManifest, write_manifest

    prefix = write(tmp_path / "a")
    manifest = DatasetManifest(
        dtype="uint16",
        documents=200,
        sequences=200,
        tokens=1,
        bin_pieces=[piece(tmp_path / "a.bin")],
        idx_pieces=[piece(tmp_path / "a.idx")],
        tokenizer={"type": "GPT2BPETokenizer", "fingerprint": "aaa"},
    )
    write_manifest(prefix, manifest)
    run = config(DataConfig(sources=(DataSource(path=prefix),)))
    build_datasets(run, tokenizer_fingerprint="aaa")
    with pytest.raises(DataError, match="fingerprint aaa"):
        build_datasets(run, tokenizer_fingerprint="bbb")
    write_manifest(prefix, replace(manifest, bin_pieces=[(5, 0)]))
    with pytest.raises(DataError, match="manifest says 5"):
        build_datasets(run)
    assert json.loads((tmp_path / "a.manifest.json").read_text(encoding="utf-8"))["tokenizer"]["fingerprint"] == "aaa"


def test_mock_data_is_deterministic_and_in_range():
    run = config(DataConfig(mock=True))
    first, second = build_datasets(run), build_datasets(run)
    assert len(first.train) == 100
    assert first.train[7].tolist() == second.train[7].tolist()
    assert first.train[7].tolist() != first.valid["valid"][7].tolist()
    assert all(0 <= first.train[sample].min() <= first.train[sample].max() < 100 for sample in range(100))


def test_counts_of_a_blend_follow_each_generation():
    assert blend_counts([3, 1], 101, modern=False)[1] == [math.ceil(101 * 0.75 * 1.005), math.ceil(101 * 0.25 * 1.005)]
    assert blend_counts([3, 1], 101, modern=True)[1] == [math.ceil(76 * 1.005), math.ceil(26 * 1.005)]
    with pytest.raises(DataError, match="not all 0"):
        blend_counts([0.0, 0.0], 10, modern=False)


def test_slices_read_every_document_once_per_epoch(tmp_path):
    prefix = write(tmp_path / "a")
    data = DataConfig(sources=(DataSource(path=prefix),), split="1", sampling="slice")
    train = build_datasets(config(data, eval_iters=0, train_iters=150)).train
    sizes = IndexedDataset(prefix).sizes
    epochs = [[train.spans(sample)[0][1] for sample in range(start, start + 200)] for start in (0, 200, 400)]
    assert all(sorted(sequence for sequence, _, _ in epoch) == list(range(200)) for epoch in epochs)
    orders = [[sequence for sequence, _, _ in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    for epoch in epochs:
        for sequence, offset, length in epoch:
            assert length == min(LENGTH + 1, sizes[sequence])
            assert 0 <= offset <= sizes[sequence] - length
    assert {offset for epoch in epochs for _, offset, _ in epoch} > {0, 1, 2, 5}


def test_slices_begin_at_every_possible_offset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.arange(LENGTH + 2))
    data = DataConfig(sources=(DataSource(path=str(tmp_path / "a")),), split="1", sampling="slice")
    train = build_datasets(config(data, eval_iters=0)).train
    assert {train.spans(sample)[0][1][1] for sample in range(100)} == {0, 1}
