"""Writing and reading .bin/.idx: round trips, bytes as documented, detection of damaged indices."""

from __future__ import annotations

import contextlib
import itertools
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.data.format import indexed_dataset
from megatron_lite.data.format.index_format import smallest_token_type
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.errors import DataError

DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=3),
    max_size=12,
)
RELAXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def write(prefix, documents, dtype=np.uint16):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in documents:
            for tokens in sequences:
                writer.add_sequence(tokens)
            writer.end_document()


def reference_bytes(documents, code, dtype):
    """Return the bytes of the format, built from its description."""
    sequences = [tokens for document in documents for tokens in document]
    sizes = [len(tokens) for tokens in sequences]
    itemsize = np.dtype(dtype).itemsize
    pointers = [sum(sizes[:index]) * itemsize for index in range(len(sizes))]
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    index = b"MMIDIDX\0\0" + struct.pack("<QB", 1, code) + struct.pack("<QQ", len(sizes), len(boundaries))
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(boundaries)}q", *boundaries)
    return np.concatenate([np.array(tokens, dtype=dtype) for tokens in [*sequences, []]]).tobytes(), index


@RELAXED
@given(documents=DOCUMENTS, kind=st.sampled_from([(1, np.uint8), (4, np.int32), (5, np.int64), (8, np.uint16)]))
def test_written_bytes_follow_the_format_and_are_read_back(tmp_path, documents, kind):
    code, dtype = kind
    write(tmp_path / "a", documents, dtype)
    tokens, index = reference_bytes(documents, code, dtype)
    assert (tmp_path / "a.bin").read_bytes() == tokens
    assert (tmp_path / "a.idx").read_bytes() == index
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.dtype == dtype
    assert [dataset.document(number).tolist() for number in range(dataset.num_documents)] == [
        list(itertools.chain.from_iterable(document)) for document in documents
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.slow
@RELAXED
@given(parts=st.lists(DOCUMENTS, max_size=4))
def test_appending_shards_equals_writing_all_at_once(tmp_path, parts):
    for number, documents in enumerate(parts):
        write(tmp_path / f"part{number}", documents)
    write(tmp_path / "whole", [document for documents in parts for document in documents])
    with IndexedDatasetWriter(tmp_path / "merged", np.uint16) as writer:
        for number in range(len(parts)):
            writer.append(tmp_path / f"part{number}")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"merged.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()


@pytest.mark.slow
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data(), eager=st.booleans())
def test_a_damaged_index_gives_a_data_error_or_the_right_tokens(tmp_path, data, eager):
    documents = [[[1, 2, 3], [4]], [[5, 6, 7, 8]], [], [[9], [10, 11]]]
    sequences = [tokens for document in documents for tokens in document]
    write(tmp_path / "a", documents)
    index = bytearray((tmp_path / "a.idx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        action = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        at = data.draw(st.integers(0, max(0, len(index) - 1)))
        if action == "flip" and index:
            index[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del index[at : at + data.draw(st.integers(1, 16))]
        else:
            index[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DataError):
        if not eager:
            patch.setattr(indexed_dataset, "EAGER", -1)
            patch.setattr(indexed_dataset, "BLOCK", 8)
        dataset = IndexedDataset(tmp_path / "a")
        if dataset.dtype == np.dtype(np.uint16) or dataset.dtype == np.dtype(np.int16):
            assert [dataset.get(number).tolist() for number in range(len(dataset))] == sequences
        for number in range(dataset.num_documents):
            dataset.document(number)


def test_lazy_checks_find_a_shifted_pointer_before_its_tokens_are_read(tmp_path, monkeypatch):
    write(tmp_path / "a", [[[index] * 5] for index in range(50)])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    at = 34 + 4 * 50 + 8 * 30
    index[at : at + 8] = struct.pack("<q", 30 * 10 - 2)
    (tmp_path / "a.idx").write_bytes(index)
    monkeypatch.setattr(indexed_dataset, "EAGER", 0)
    monkeypatch.setattr(indexed_dataset, "BLOCK", 8)
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.get(3).tolist() == [3] * 5
    with pytest.raises(DataError, match="sequence 29 ends at byte 300"):
        dataset.get(30)


@pytest.mark.parametrize("shift", [-10_000, 10_000])
def test_lazy_checks_find_a_shifted_block(tmp_path, monkeypatch, shift):
    """Within the block every sequence ends at the beginning of the next; only the bounds of the file are violated."""
    write(tmp_path / "a", [[[index] * 5] for index in range(50)])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    for sequence in range(16, 25):
        at = 34 + 4 * 50 + 8 * sequence
        index[at : at + 8] = struct.pack("<q", sequence * 10 + shift)
    (tmp_path / "a.idx").write_bytes(index)
    monkeypatch.setattr(indexed_dataset, "EAGER", 0)
    monkeypatch.setattr(indexed_dataset, "BLOCK", 8)
    dataset = IndexedDataset(tmp_path / "a")
    with pytest.raises(DataError, match="places sequences 16 to 24 at bytes"):
        dataset.get(20)


def test_parts_of_a_sequence(tmp_path):
    write(tmp_path / "a", [[[1, 2, 3, 4, 5]]])
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.get(0, 1, 3).tolist() == [2, 3, 4]
    assert dataset.get(0, 5).tolist() == []
    for offset, length in ((-1, 1), (0, 6), (3, -1)):
        with pytest.raises(IndexError):
            dataset.get(0, offset, length)
    with pytest.raises(IndexError):
        dataset.get(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.idx").unlink(), r"a\.idx does not"),
        (lambda folder: (folder / "a.bin").unlink(), r"a\.bin does not"),
        (lambda folder: (folder / "a.bin").write_bytes(b"\0" * 4), "the .bin has 4 bytes, the .idx describes 6"),
        (lambda folder: (folder / "a.idx").write_bytes(b""), "it has 0 bytes"),
        (lambda folder: (folder / "a.idx").write_bytes(b"TNTIDX\0\0" + b"\0" * 40), "megatron-lite data convert"),
        (lambda folder: (folder / "a.idx").write_bytes(b'{"text": "no"}' * 9), "begins with the bytes"),
    ],
)
def test_a_damaged_pair_is_refused(tmp_path, damage, message):
    write(tmp_path / "a", [[[1, 2, 3]]])
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (9, b"\2", "version 2"),
        (17, b"\6", "unknown token type 6"),
        (18, b"\xff" * 8, "bytes"),
        (26, b"\0" * 8, "bytes"),
    ],
)
def test_a_header_of_another_dataset_type_is_refused(tmp_path, at, value, message):
    write(tmp_path / "a", [[[1, 2, 3]]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    index[at : at + len(value)] = value
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


def test_a_multimodal_index_is_refused(tmp_path):
    write(tmp_path / "a", [[[1, 2, 3]], [[4]]])
    with (tmp_path / "a.idx").open("ab") as file:
        file.write(b"\0\1")
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(tmp_path / "a")


def test_the_error_of_a_missing_prefix_suggests_an_existing_one(tmp_path):
    write(tmp_path / "corpus_text_document", [[[1]]])
    with pytest.raises(DataError, match="corpus_text_document"):
        IndexedDataset(tmp_path / "corpus")
    with pytest.raises(DataError, match="common prefix"):
        IndexedDataset(tmp_path / "corpus_text_document.bin")


def test_a_token_outside_the_type_is_refused_without_leaving_files(tmp_path):
    with (
        pytest.raises(DataError, match=r"document 1 to the dataset .*: it has token ids from 1 to 70000"),
        IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer,
    ):
        writer.add_document([5])
        writer.add_document([1, 70000])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_pair(tmp_path):
    write(tmp_path / "a", [[[1, 2, 3]]])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([9])
        raise RuntimeError
    assert IndexedDataset(tmp_path / "a").get(0).tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_read_only_folder_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write the dataset"):
        IndexedDatasetWriter(tmp_path / "file" / "a", np.uint16)


def test_a_full_disk_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No space left"):
        writer = IndexedDatasetWriter(tmp_path / "a", np.uint16)
        writer._files["bin"].close()
        writer._files["bin"] = open("/dev/full", "wb")  # noqa: SIM115, PTH123
        writer.add_document([1] * 10)
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_token_type_are_refused(tmp_path):
    write(tmp_path / "a", [[[1]]], np.int32)
    with (
        pytest.raises(DataError, match="with tokens of type int32"),
        IndexedDatasetWriter(tmp_path / "b", np.uint16) as writer,
    ):
        writer.append(tmp_path / "a")


def test_a_bin_truncated_while_open_is_a_data_error(tmp_path):
    write(tmp_path / "a", [[[1, 2, 3, 4]]])
    dataset = IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(b"\1\0")
    with pytest.raises(DataError, match="ends at byte 2 and had 8"):
        dataset.get(0)


@pytest.mark.parametrize(("vocab", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_token_type_by_vocabulary(vocab, dtype):
    assert smallest_token_type(vocab) == dtype


def test_a_document_without_tokens_has_no_sequence(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([])
        writer.add_document([1])
    dataset = IndexedDataset(tmp_path / "a")
    assert (len(dataset), dataset.num_documents, dataset.document_index.tolist()) == (1, 2, [0, 0, 1])
