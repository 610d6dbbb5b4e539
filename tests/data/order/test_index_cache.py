"""Index caches: this project's is written once and mapped; Megatron's are used only if they match the plan."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.order import index_cache
from megatron_lite.data.order.index_cache import Notices, cached_index
from megatron_lite.data.order.megatron_cache import find_megatron_index
from megatron_lite.data.order.sample_index import build_index, plan_index

LENGTH = 8


@pytest.fixture
def data(tmp_path):
    rng = np.random.RandomState(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for size in rng.randint(0, 40, 300):
            writer.add_sequence(rng.randint(0, 100, size))
            writer.end_document()
    return IndexedDataset(tmp_path / "corpus")


@pytest.fixture
def notices():
    return Notices()


def plan_for(data, bounds=(0, 280), num_samples=1500, seed=7, order="legacy"):
    return plan_index(
        data.sizes, bounds, num_samples=num_samples, seq_length=LENGTH, seed=seed, order=order, prefix=data.prefix
    )


def megatrons_arrays(plan, sizes):
    """Return the three arrays that Megatron saves, with the sample rows in closed form."""
    index = build_index(plan, sizes)
    ends = np.concatenate([[0], np.cumsum(sizes[index.documents], dtype=np.int64)])
    tokens = np.arange(plan.total_samples + 1) * LENGTH
    positions = np.searchsorted(ends, tokens, side="right") - 1
    rows = np.stack([positions, tokens - ends[positions]], axis=1).astype(np.int32)
    return index, {"doc_idx": index.documents, "sample_idx": rows, "shuffle_idx": index.shuffle}


def save_legacy(plan, data, name="train", **changed):
    index, arrays = megatrons_arrays(plan, data.sizes)
    stem = f"{data.prefix}_{name}_indexmap_{plan.num_samples}ns_{LENGTH}sl_{plan.seed}s"
    for part, values in {**arrays, **changed}.items():
        np.save(f"{stem}_{part}.npy", values)
    return index


def save_modern(plan, data, folder, name="train", split="949,50,1"):
    index, arrays = megatrons_arrays(plan, data.sizes)
    description = json.dumps(
        {
            "class": "GPTDataset", "dataset_path": data.prefix, "num_samples": plan.num_samples, "index_split": name,
            "random_seed": plan.seed, "sequence_length": LENGTH, "split": split,
            "split_matrix": [[0, 0.949], [0.949, 0.999], [0.999, 1.0]], "tokenizer": {"class": "_GPT2BPETokenizer"},
        },
        indent=4,
    )  # fmt: skip
    stem = f"{hashlib.md5(description.encode()).hexdigest()}-GPTDataset-{name}"
    folder.mkdir(parents=True)
    (folder / f"{stem}-description.txt").write_text(description, encoding="utf-8")
    for part, values in zip(("document_index", "sample_index", "shuffle_index"), arrays.values(), strict=True):
        np.save(folder / f"{stem}-{part}.npy", values)
    return index


def assert_same(found, index, sizes):
    assert len(found) == len(index)
    assert all(found.spans(sample, sizes) == index.spans(sample, sizes) for sample in range(len(index)))


def test_a_legacy_cache_is_used(data, notices):
    plan = plan_for(data)
    index = save_legacy(plan, data)
    found = find_megatron_index(data.prefix, "train", "949,50,1", None, plan, data.sizes, notices)
    assert found.rows is not None
    assert_same(found, index, data.sizes)
    assert find_megatron_index(data.prefix, "valid", "949,50,1", None, plan, data.sizes, notices) is None


@pytest.mark.parametrize("beside", [True, False])
def test_a_modern_cache_is_used_whatever_its_tokenizer(data, tmp_path, beside, notices):
    plan = plan_for(data, order="modern")
    folder = tmp_path / "cache" / "GPTDataset_indices" if beside else tmp_path / "elsewhere"
    index = save_modern(plan, data, folder)
    cache = None if beside else folder
    found = find_megatron_index(data.prefix, "train", "949,50,1", cache, plan, data.sizes, notices)
    assert_same(found, index, data.sizes)
    assert find_megatron_index(data.prefix, "train", "900,50,1", cache, plan, data.sizes, notices) is None
    assert find_megatron_index(data.prefix, "train", "949,50,1", cache, plan_for(data), data.sizes, notices) is None


def test_a_cache_of_another_split_is_refused(data, notices):
    """The name of a legacy cache contains the number of samples, but no range of documents."""
    save_legacy(plan_for(data, bounds=(0, 280)), data)
    for bounds in ((0, 290), (5, 285), (1, 281)):
        plan = plan_for(data, bounds=bounds)
        assert find_megatron_index(data.prefix, "train", "", None, plan, data.sizes, notices) is None
        assert "rebuilding the index" in notices.warnings.pop()


def test_a_cache_of_other_lengths_is_refused(data, notices):
    """The dataset was preprocessed again, with as many tokens in other documents."""
    plan = plan_for(data)
    save_legacy(plan, data)
    sizes = data.sizes.copy()
    sizes[:280] = np.roll(sizes[:280], 1)
    assert find_megatron_index(data.prefix, "train", "", None, plan, sizes, notices) is None
    assert "by the dataset's lengths" in notices.warnings[-1]


def equal_lengths(tmp_path, size):
    with IndexedDatasetWriter(tmp_path / "equal", np.uint16) as writer:
        for _ in range(300):
            writer.add_document(np.zeros(size))
    return IndexedDataset(tmp_path / "equal")


def test_a_cache_of_another_range_with_as_many_tokens_is_refused(tmp_path, notices):
    """With documents of equal length all shapes agree; only the range differs."""
    data = equal_lengths(tmp_path, 20)
    save_legacy(plan_for(data, bounds=(0, 280)), data)
    assert (
        find_megatron_index(data.prefix, "train", "", None, plan_for(data, bounds=(5, 285)), data.sizes, notices)
        is None
    )
    assert "covers sequences 0 to 280, the split is 5 to 285" in notices.warnings[-1]


def test_a_cache_of_slightly_other_lengths_is_refused(tmp_path, notices):
    """Documents are much longer than a sample, so most adjacent samples are in one document."""
    data = equal_lengths(tmp_path, 10_000)
    plan = plan_for(data)
    save_legacy(plan, data)
    sizes = data.sizes.copy()
    sizes[100] += 1
    sizes[200] -= 1
    assert find_megatron_index(data.prefix, "train", "", None, plan, sizes, notices) is None
    assert "by the dataset's lengths" in notices.warnings[-1]


@pytest.mark.parametrize("part", ["doc_idx", "sample_idx", "shuffle_idx"])
def test_a_truncated_cache_is_refused(data, notices, part):
    plan = plan_for(data)
    _, arrays = megatrons_arrays(plan, data.sizes)
    save_legacy(plan, data, **{part: arrays[part][:-1]})
    assert find_megatron_index(data.prefix, "train", "", None, plan, data.sizes, notices) is None
    assert "shape" in notices.warnings[-1]


def test_a_cache_that_is_no_array_is_refused(data, notices):
    plan = plan_for(data)
    save_legacy(plan, data)
    next(iter(data_files(data, "*_doc_idx.npy"))).write_bytes(b"\x93NUMPY")
    assert find_megatron_index(data.prefix, "train", "", None, plan, data.sizes, notices) is None
    assert "Cannot read" in notices.warnings[-1]


def data_files(data, pattern):
    return sorted(Path(data.prefix).parent.rglob(pattern))


def test_a_small_index_leaves_no_files(data, tmp_path, notices):
    cached_index(plan_for(data), data, None, notices)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]


@pytest.fixture
def always_kept(monkeypatch):
    monkeypatch.setattr(index_cache, "WORTH_KEEPING", 0)


@pytest.mark.usefixtures("always_kept")
def test_own_cache_is_written_once_and_mapped_afterwards(data, tmp_path, monkeypatch, notices):
    plan = plan_for(data)
    index = cached_index(plan, data, tmp_path / "cache", notices)
    assert isinstance(index.documents, np.memmap)
    assert_same(index, build_index(plan, data.sizes), data.sizes)
    monkeypatch.setattr(index_cache, "build_index", lambda *_: pytest.fail("built twice"))
    again = cached_index(plan, data, tmp_path / "cache", notices)
    assert isinstance(again.documents, np.memmap)
    assert_same(again, index, data.sizes)
    assert not data_files(data, "*.tmp")


@pytest.mark.usefixtures("always_kept")
@pytest.mark.parametrize("change", [{"seed": 8}, {"bounds": (0, 281)}, {"num_samples": 1501}, {"order": "modern"}])
def test_own_cache_is_found_by_the_same_plan_only(data, tmp_path, change, notices):
    cached_index(plan_for(data), data, tmp_path / "cache", notices)
    plan = plan_for(data, **change)
    assert_same(cached_index(plan, data, tmp_path / "cache", notices), build_index(plan, data.sizes), data.sizes)
    assert len(list((tmp_path / "cache").glob("index-*/plan.json"))) == 2


@pytest.mark.usefixtures("always_kept")
def test_a_damaged_own_cache_is_rebuilt(data, tmp_path, notices):
    plan = plan_for(data)
    index = build_index(plan, data.sizes)
    cached_index(plan, data, tmp_path / "cache", notices)
    damaged = next((tmp_path / "cache").glob("index-*/documents.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert_same(cached_index(plan, data, tmp_path / "cache", notices), index, data.sizes)
    assert "rebuilding it" in notices.warnings[-1]
    notices.warnings.clear()
    cached_index(plan, data, tmp_path / "cache", notices)
    assert not notices.warnings


@pytest.mark.usefixtures("always_kept")
def test_one_process_builds_while_others_wait(data, tmp_path, monkeypatch, notices):
    built, plan = [], plan_for(data)

    def slow(*arguments):
        built.append(1)
        threading.Event().wait(0.2)
        return build_index(*arguments)

    monkeypatch.setattr(index_cache, "build_index", slow)
    threads = [threading.Thread(target=cached_index, args=(plan, data, tmp_path / "cache", notices)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


@pytest.mark.usefixtures("always_kept")
def test_a_read_only_cache_folder_causes_a_warning(data, tmp_path, notices):
    (tmp_path / "file").write_text("")
    plan = plan_for(data)
    assert_same(
        cached_index(plan, data, tmp_path / "file" / "cache", notices), build_index(plan, data.sizes), data.sizes
    )
    assert "built at every start" in notices.warnings[-1]
