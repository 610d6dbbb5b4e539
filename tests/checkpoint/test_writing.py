"""Files of records: what lies where, when a new file begins, and what is left after a failure."""

from __future__ import annotations

import io
import zlib
from contextlib import contextmanager

import pytest
import torch

from megatron_lite.checkpoint import writing
from megatron_lite.checkpoint.writing import PieceWriter, write_dcp_metadata, write_pieces
from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.rectangle import Rectangle

HEADERS = 1 << 12


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_record_is_a_part_with_its_checksum_and_can_be_read_alone(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}
    with PieceWriter(tmp_path, 5) as writer:
        writer.write("a", (4, 3), Rectangle((2, 0), (2, 3)), tensors["a"])
        writer.write("b", (3,), Rectangle.full((3,)), tensors["b"])
        writer.write("a", (4, 3), Rectangle.full((2, 3)), tensors["a"] + 1)
    share = writer.share(("a", "b"))
    (name, data), *others = written(tmp_path).items()
    assert name == "__5_0.distcp" and not others
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


def test_a_file_is_full_when_the_next_record_might_exceed_its_size(tmp_path):
    tensor = torch.zeros(1000)
    with PieceWriter(tmp_path, 0) as writer:
        writer.write("w", (1000,), Rectangle.full((1000,)), tensor)
    record = writer.share(()).files["__0_0.distcp"].size
    for size, files in ((record + tensor.nbytes + HEADERS, 2), (record + tensor.nbytes + HEADERS - 1, 3), (1, 3)):
        folder = tmp_path / str(size)
        folder.mkdir()
        with PieceWriter(folder, 0, file_size=size) as writer:
            for number in range(3):
                writer.write("w", (3000,), Rectangle((1000 * number,), (1000,)), tensor)
        assert sorted(written(folder)) == [f"__0_{number}.distcp" for number in range(files)]
        found = writer.share(()).files
        assert {name: len(data) for name, data in written(folder).items()} == {
            name: file.size for name, file in found.items()
        }


def test_without_a_tensor_there_is_no_file(tmp_path):
    share = write_pieces(tmp_path, [], 0)
    assert not written(tmp_path) and not share.files and not share.tensors


def test_only_the_writer_of_a_tensor_writes_it_and_all_who_hold_it_say_so(tmp_path):
    tensor = torch.arange(8.0)
    pieces = [Piece((0,), tensor[:3]), Piece((5,), tensor[5:])]
    share = write_pieces(
        tmp_path,
        [GlobalTensor("mine", (8,), tensor.dtype, pieces), GlobalTensor("theirs", (8,), tensor.dtype, pieces, False)],
        2,
    )
    assert list(share.tensors) == ["mine"] and share.held == ("mine", "theirs")
    assert [piece.rectangle for piece in share.tensors["mine"].pieces] == [Rectangle((0,), (3,)), Rectangle((5,), (3,))]


@pytest.fixture
def synced(monkeypatch):
    """Files whose content was forced to the disk."""
    found = []
    monkeypatch.setattr(writing.os, "fsync", found.append)
    return found


def test_the_disk_is_waited_for_unless_there_was_an_error(tmp_path, synced):
    with PieceWriter(tmp_path, 0) as writer:
        writer.write("w", (2,), Rectangle.full((2,)), torch.zeros(2))
    assert len(synced) == 1
    with pytest.raises(KeyError), PieceWriter(tmp_path, 1) as writer:
        writer.write("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        file = writer._file
        raise KeyError
    assert len(synced) == 1 and file.closed and not writer.share(()).files


@contextmanager
def saving_fails(monkeypatch, error, cause=None):
    """torch.save raises `error` while it handles `cause`."""

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


def test_a_failed_write_is_what_is_raised_and_not_torchs_complaint_about_it(tmp_path, monkeypatch):
    full, complaint = OSError(28, "No space left on device"), RuntimeError("unexpected pos")
    with PieceWriter(tmp_path, 0) as writer:
        with saving_fails(monkeypatch, complaint, full), pytest.raises(OSError, match="No space left") as caught:
            writer.write("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        assert caught.value is full
        with saving_fails(monkeypatch, complaint), pytest.raises(RuntimeError, match="unexpected pos") as caught:
            writer.write("w", (2,), Rectangle.full((2,)), torch.zeros(2))
        assert caught.value is complaint and complaint.__cause__ is None


def test_rectangles_are_views():
    tensor = torch.arange(24).reshape(4, 6)
    part = narrow(tensor, Rectangle((1, 2), (2, 3)))
    assert part.tolist() == [[8, 9, 10], [14, 15, 16]]
    assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert narrow(torch.tensor(5), Rectangle((), ())) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_layout_is_saved_without_what_lies_around_it(tmp_path, dtype):
    whole = torch.arange(200).reshape(10, 20).to(dtype)
    parts = [whole[2:5], whole.t()[3:9], whole[::2, ::3], whole[0, 0]]
    with PieceWriter(tmp_path, 0) as writer:
        for number, part in enumerate(parts):
            writer.write(str(number), part.shape, Rectangle.full(part.shape), part)
    (data,) = written(tmp_path).values()
    for part, saved in zip(parts, writer.share(()).files["__0_0.distcp"].parts, strict=True):
        loaded = torch.load(io.BytesIO(data[saved.start : saved.start + saved.length]))
        assert torch.equal(loaded, part) and loaded.dtype == dtype
        assert loaded.untyped_storage().nbytes() == part.nbytes
        assert saved.length < part.nbytes + HEADERS


def test_metadata_is_a_file_of_one_part(tmp_path):
    share = write_pieces(tmp_path, [GlobalTensor("w", (2,), torch.float32, [Piece((0,), torch.zeros(2))])], 0)
    saved = write_dcp_metadata(tmp_path, share.tensors, share.files)
    data = (tmp_path / ".metadata").read_bytes()
    assert [(part.start, part.length, part.crc32) for part in saved.parts] == [(0, len(data), zlib.crc32(data))]
