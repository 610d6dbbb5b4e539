"""Dataset fingerprints: independent of the path, changed by any change of the content."""

from __future__ import annotations

import shutil
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
from megatron_lite.data.format import fingerprint
from megatron_lite.data.format.fingerprint import content_fingerprint, data_fingerprints, lengths_fingerprint
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter

DOCUMENTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]


def write(prefix, documents):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def of(prefix):
    return content_fingerprint(IndexedDataset(prefix))


def test_a_copy_under_another_name_has_the_same_fingerprint(tmp_path):
    one = write(tmp_path / "one", DOCUMENTS)
    (tmp_path / "elsewhere").mkdir()
    for ending in ("bin", "idx"):
        shutil.copy(f"{one}.{ending}", tmp_path / "elsewhere" / f"two.{ending}")
    assert of(one) == of(tmp_path / "elsewhere" / "two")


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_other_text_has_another_fingerprint(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("data")
    documents = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=6)
    one, two = data.draw(documents), data.draw(documents)
    same = of(write(folder / "one", one)) == of(write(folder / "two", two))
    assert same == (one == two)


def test_the_lengths_fingerprint_ignores_tokens(tmp_path):
    one, two = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "two", [[0] * len(d) for d in DOCUMENTS])
    assert of(one) != of(two)
    assert lengths_fingerprint(IndexedDataset(one)) == lengths_fingerprint(IndexedDataset(two))


@pytest.mark.parametrize("place", [0, 1, 500, 998, 999])
def test_long_files_are_sampled(tmp_path, monkeypatch, place):
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 8)
    monkeypatch.setattr(fingerprint, "PIECE_LENGTHS", 4)
    documents = [[number % 7] for number in range(1000)]
    one = write(tmp_path / "one", documents)
    documents[place] = [*documents[place], 1]
    documents[(place + 300) % 1000] = []
    changed = write(tmp_path / "changed", documents)
    # Both ends are always sampled.
    assert of(one) != of(changed)


@pytest.mark.parametrize("total", [0, 1, 63, 64, 65, 1000])
def test_sampled_places_are_within_the_file_and_include_both_ends(total):
    pieces = list(fingerprint._pieces(total, 4))
    assert (pieces[0][0], pieces[-1][1]) == (0, total)
    assert all(0 <= start <= end <= total for start, end in pieces)
    assert sum(end - start for start, end in pieces) == min(total, 64)


def run_config(**data):
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        batch=BatchConfig(seq_length=8, micro_batch_size=1, global_batch_size=1),
        training=TrainingConfig(train_iters=1),
        data=DataConfig(**data),
    )


def test_fingerprints_of_a_blend_have_weight_and_path(tmp_path):
    one, two = write(tmp_path / "one", DOCUMENTS), write(tmp_path / "two", DOCUMENTS[1:])
    sources = (DataSource(path=one, weight=0.3), DataSource(path=two, weight=0.7))
    found = data_fingerprints(run_config(sources=sources, split="9,1,0"))
    assert found == {
        "data order": "seed 1234, --seq-length 8, legacy, concatenated, --split 9,1,0",
        "data source 1": f"weight 0.3, {of(one)} of {one}",
        "data source 2": f"weight 0.7, {of(two)} of {two}",
    }


def test_fingerprints_of_weighted_split_paths(tmp_path):
    one = write(tmp_path / "one", DOCUMENTS)
    half = DataSource(path=one, weight=1.0, end=0.5)
    groups = {"train_groups": ("train", half), "valid_groups": ("en", replace(half, start=0.5, end=1.0))}
    found = data_fingerprints(
        run_config(**{key: (DataGroup(name=name, sources=(source,)),) for key, (name, source) in groups.items()})
    )
    assert list(found) == ["data order", "data train 1", "data valid en 1"]
    assert found["data valid en 1"] == f"weight 1, documents 0.5 to 1, {of(one)} of {one}"


def test_fingerprint_of_mock_data():
    assert data_fingerprints(run_config(mock=True))["data source"] == "random tokens of --mock-data"
