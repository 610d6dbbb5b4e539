"""Conversion of datasets of the older lazy/cached format."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.older_index import convert_older
from megatron_lite.errors import DataError

DOCUMENTS = [[[1, 2, 3], [4]], [], [[5, 6]]]


def write_older(prefix, documents, *, code=4, dtype=np.int32, cut=0):
    sequences = [tokens for document in documents for tokens in document]
    sizes = [len(tokens) for tokens in sequences]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    boundaries = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    index = b"TNTIDX\0\0" + struct.pack("<QQQ", 1, code, np.dtype(dtype).itemsize)
    index += struct.pack("<QQQ", len(sizes), len(sizes), len(boundaries))
    for part in (np.arange(len(sizes) + 1), offsets, sizes, boundaries):
        index += np.asarray(part, dtype="<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index[: len(index) - cut])
    np.concatenate(sequences).astype(dtype).tofile(prefix.with_suffix(".bin"))


@pytest.mark.parametrize(("code", "dtype"), [(4, np.int32), (8, np.uint16)])
def test_tokens_sequences_and_documents_are_kept(tmp_path, code, dtype):
    write_older(tmp_path / "old", DOCUMENTS, code=code, dtype=dtype)
    assert convert_older(tmp_path / "old", tmp_path / "new") == 3
    data = IndexedDataset(tmp_path / "new")
    assert data.dtype == dtype
    assert [data.get(number).tolist() for number in range(len(data))] == [[1, 2, 3], [4], [5, 6]]
    assert data.document_index.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"cut": 8}, "168 bytes instead of 176"), ({"code": 7}, "type code 7"), ({"dtype": np.int64}, "8 bytes a token")],
)
def test_a_damaged_index_is_refused(tmp_path, change, fault):
    write_older(tmp_path / "old", DOCUMENTS, **change)
    with pytest.raises(DataError, match=f"older format.*{fault}"):
        convert_older(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new.idx").exists()


def test_a_bin_of_another_length_is_refused(tmp_path):
    write_older(tmp_path / "old", DOCUMENTS)
    (tmp_path / "old.bin").write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match="end at token 6 of 5"):
        convert_older(tmp_path / "old", tmp_path / "new")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not"):
        convert_older(tmp_path / "none", tmp_path / "new")
