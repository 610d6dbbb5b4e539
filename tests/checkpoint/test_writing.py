"""Tests of CheckpointWriter: records and checksums, file sizes, durability, failed writes."""

from __future__ import annotations

import io
import os
import zlib
from contextlib import contextmanager

import pytest
import torch

from megatron_lite.backend.group import LocalGroup
from megatron_lite.checkpoint import writing
from megatron_lite.checkpoint.writing import CheckpointWriter, SaveRequest
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.manifest import Provenance, read_manifest

HEADERS = 1 << 12


def open_writer(root, **options):
    return CheckpointWriter(SaveRequest(root, 1, {}, Provenance()), LocalGroup("world"), 0, **options)


def written(writer):
    """Content of the data files."""
    return {path.name: path.read_bytes() for path in sorted(writer.folder.glob("*.distcp"))}


def test_each_record_has_a_checksum_and_is_readable_alone(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}
    with open_writer(tmp_path) as writer:
        writer.add("a", (4, 3), Rectangle((2, 0), (2, 3)), tensors["a"])
        writer.add("b", (3,), Rectangle.full((3,)), tensors["b"])
        writer.add("a", (4, 3), Rectangle.full((2, 3)), tensors["a"] + 1)
        assert writer.share(0) is None
        writer.close()
        share = writer.share(0)
        (name, data), *others = written(writer).items()
    assert name == "__0_0.distcp" and not others
    parts = share.files[name].parts
    assert [part.start for part in parts] == [0, parts[0].length, parts[0].length + parts[1].length]
    assert share.files[name].size == len(data)
    records = []
    for part in parts:
        record = data[part.start : part.start + part.length]
        assert part.crc32 == zlib.crc32(record)
        records.append(torch.load(io.BytesIO(record)))
    assert torch.equal(records[0], tensors["a"]) and torch.equal(records[1], tensors["b"])
    pieces = share.tensors["a"].pieces
    assert [(piece.rectangle, piece.file, piece.part) for piece in pieces] == [
        (Rectangle((2, 0), (2, 3)), name, 0),
        (Rectangle((0, 0), (2, 3)), name, 2),
    ]
    assert (share.tensors["a"].shape, share.tensors["a"].dtype) == ((4, 3), "float32")
    assert share.tensors["b"].dtype == "int64" and share.held == ("a", "b")


def test_a_new_file_begins_before_the_size_would_be_exceeded(tmp_path):
    tensor = torch.zeros(1000)
    with open_writer(tmp_path) as writer:
        writer.add("w", (1000,), Rectangle.full((1000,)), tensor)
        writer.close()
        record = writer.share(0).files["__0_0.distcp"].size
    for size, files in ((record + tensor.nbytes + HEADERS, 2), (record + tensor.nbytes + HEADERS - 1, 3), (1, 3)):
        with open_writer(tmp_path, file_size=size) as writer:
            for number in range(3):
                writer.add("w", (3000,), Rectangle((1000 * number,), (1000,)), tensor)
            writer.close()
            contents, found = written(writer), writer.share(0).files
        assert list(contents) == [f"__0_{number}.distcp" for number in range(files)]
        assert {name: len(data) for name, data in contents.items()} == {name: file.size for name, file in found.items()}


def test_without_a_tensor_there_is_no_file(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.add_tensors([])
        writer.close()
        share = writer.share(0)
        assert not written(writer) and not share.files and not share.tensors


def test_only_the_writing_rank_writes_but_all_record_the_name(tmp_path):
    tensor = torch.arange(8.0)
    pieces = [Piece((0,), tensor[:3]), Piece((5,), tensor[5:])]
    with open_writer(tmp_path) as writer:
        writer.add_tensors(
            [
                GlobalTensor("mine", (8,), tensor.dtype, pieces),
                GlobalTensor("theirs", (8,), tensor.dtype, pieces, write=False),
            ]
        )
        writer.close()
        share = writer.share(0)
    assert list(share.tensors) == ["mine"] and share.held == ("mine", "theirs")
    assert [piece.rectangle for piece in share.tensors["mine"].pieces] == [Rectangle((0,), (3,)), Rectangle((5,), (3,))]


@pytest.fixture
def synced(monkeypatch):
    """Inodes of files and folders that were synced to the disk."""
    found = []
    monkeypatch.setattr(writing.os, "fsync", lambda descriptor: found.append(os.fstat(descriptor).st_ino))
    return found


def test_files_are_synced_unless_there_was_an_error(tmp_path, synced):
    with open_writer(tmp_path) as writer:
        writer.add("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        assert not synced
        writer.close()
        assert (writer.folder / "__0_0.distcp").stat().st_ino in synced
    synced.clear()
    with pytest.raises(KeyError), open_writer(tmp_path) as writer:
        writer.add("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        file = writer._file
        raise KeyError
    assert not synced and file.closed and not writer.folder.exists()


@contextmanager
def saving_fails(monkeypatch, error, cause=None):
    """Make torch.save raise `error` while it handles `cause`."""

    def save(*_):
        if cause is None:
            raise error
        try:
            raise cause
        except OSError:
            raise error  # noqa: B904, as torch does it

    with monkeypatch.context() as patch:
        patch.setattr(writing.torch, "save", save)
        yield


def test_the_error_of_a_failed_write_is_raised_rather_than_torchs(tmp_path, monkeypatch):
    full, torch_error = OSError(28, "No space left on device"), RuntimeError("unexpected pos")
    with open_writer(tmp_path) as writer:
        with (
            saving_fails(monkeypatch, torch_error, full),
            pytest.raises(CheckpointError, match="No space left") as caught,
        ):
            writer.add("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        assert caught.value.__cause__ is full
        with saving_fails(monkeypatch, torch_error), pytest.raises(RuntimeError, match="unexpected pos") as caught:
            writer.add("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        assert caught.value is torch_error and torch_error.__cause__ is None


def test_rectangles_are_views():
    tensor = torch.arange(24).reshape(4, 6)
    part = narrow(tensor, Rectangle((1, 2), (2, 3)))
    assert part.tolist() == [[8, 9, 10], [14, 15, 16]]
    assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert narrow(torch.tensor(5), Rectangle((), ())) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_strided_views_are_saved_alone(tmp_path, dtype):
    whole = torch.arange(200).reshape(10, 20).to(dtype)
    parts = [whole[2:5], whole.t()[3:9], whole[::2, ::3], whole[0, 0]]
    with open_writer(tmp_path) as writer:
        for number, part in enumerate(parts):
            writer.add(str(number), part.shape, Rectangle.full(part.shape), part)
        writer.close()
        (data,), share = written(writer).values(), writer.share(0)
    for part, saved in zip(parts, share.files["__0_0.distcp"].parts, strict=True):
        loaded = torch.load(io.BytesIO(data[saved.start : saved.start + saved.length]))
        assert torch.equal(loaded, part) and loaded.dtype == dtype
        assert loaded.untyped_storage().nbytes() == part.nbytes
        assert saved.length < part.nbytes + HEADERS


def test_metadata_is_a_file_of_one_part(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.add("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        writer.close()
        path = writer.finish().path
    data, saved = (path / ".metadata").read_bytes(), read_manifest(path).files[".metadata"]
    assert [(part.start, part.length, part.crc32) for part in saved.parts] == [(0, len(data), zlib.crc32(data))]
