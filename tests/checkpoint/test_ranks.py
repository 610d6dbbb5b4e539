"""Tests of saves and loads on several gloo ranks: any layout reads any other, errors reach all ranks."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import writing
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.errors import CheckpointError, failed_rank
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.manifest import CorruptCheckpointError, Provenance, read_manifest
from megatron_lite.runs.turnover import remove_stale

COLUMN = torch.arange(2 * 12 * 8.0).reshape(2, 12, 8)
ROW = torch.arange(8 * 24.0).reshape(8, 24) + 1000
NORM = torch.arange(8.0) + 2000
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 1, 3)]


def flat_range(name, tensor, rank, size):
    """ZeRO-1 shard of a matrix: a range of its elements, in at most three rectangles."""
    rows, columns = tensor.shape
    per_rank = -(-tensor.numel() // size)
    begin, end = min(rank * per_rank, tensor.numel()), min((rank + 1) * per_rank, tensor.numel())
    pieces = []
    while begin < end:
        row, column = divmod(begin, columns)
        if column == 0 and end - begin >= columns:
            count = (end - begin) // columns
            pieces.append(Piece((row, 0), tensor[row : row + count]))
            begin += count * columns
        else:
            stop = min(columns, column + end - begin)
            pieces.append(Piece((row, column), tensor[row : row + 1, column:stop]))
            begin += stop - column
    assert len(pieces) <= 3
    return GlobalTensor(name, (rows, columns), tensor.dtype, pieces)


def held(layout, rank, fill):
    """State of two layers and an optimizer's moment on a rank of a (tp, pp, dp) layout."""
    tp, pp, dp = layout
    t, d, p = rank % tp, rank // tp % dp, rank // (tp * dp)
    tensors = []
    for layer in range(2):
        if layer * pp // 2 != p:
            continue
        column, row = (COLUMN + layer).chunk(tp, 1)[t].clone(), (ROW + layer).chunk(tp, 1)[t].clone()
        norm, moment = (NORM + layer).clone(), (ROW + layer + 0.5).chunk(tp, 1)[t].clone()
        if not fill:
            for tensor in (column, row, norm, moment):
                tensor.fill_(-1)
        place = t * 12 // tp
        tensors += [
            GlobalTensor(f"{layer}.column", (2, 12, 8), column.dtype, [Piece((0, place, 0), column)], d == 0),
            GlobalTensor(f"{layer}.row", (8, 24), row.dtype, [Piece((0, t * 24 // tp), row)], d == 0),
            GlobalTensor(f"{layer}.norm", (8,), norm.dtype, [Piece((0,), norm)], d == 0 and t == 0),
        ]
        part = flat_range(f"optimizer.exp_avg.{layer}.row", moment, d, dp)
        moved = [Piece((piece.offset[0], piece.offset[1] + t * 24 // tp), piece.tensor) for piece in part.pieces]
        tensors.append(GlobalTensor(part.name, (8, 24), moment.dtype, moved))
    return tensors


def size(layout):
    return layout[0] * layout[1] * layout[2]


@pytest.mark.slow
@pytest.mark.parametrize("writer", LAYOUTS)
def test_every_layout_reads_every_layout(tmp_path, on_ranks, writer):
    def save(world):
        save_checkpoint(SaveRequest(tmp_path, 1, {"a": 1}, Provenance()), held(writer, world.rank, True), world)

    on_ranks(size(writer), save)
    manifest = verify_checkpoint(tmp_path / "iter_0000001")
    elements = 2 * (COLUMN.numel() + ROW.numel() * 2 + NORM.numel())
    pieces = [piece for tensor in manifest.tensors.values() for piece in tensor.pieces]
    assert sum(piece.rectangle.numel for piece in pieces) == elements
    assert len({file for file in manifest.files if file.endswith(".distcp")}) == size(writer)

    def load(world):
        for reader in (layout for layout in LAYOUTS if size(layout) == world.size):
            loaded = held(reader, world.rank, False)
            assert load_checkpoint(tmp_path / "iter_0000001", loaded, world) == {"a": 1}
            for got, wanted in zip(loaded, held(reader, world.rank, True), strict=True):
                assert got.name == wanted.name
                assert all(a.tensor.equal(b.tensor) for a, b in zip(got.pieces, wanted.pieces, strict=True))

    for ranks in (1, 2, 3, 4):
        on_ranks(ranks, load)


def test_a_failed_write_on_one_rank_fails_the_save_on_all(tmp_path, on_ranks, monkeypatch):
    def full(path, mode):
        raise OSError(28, "No space left on device", str(path))

    def save(world):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), held((2, 1, 1), world.rank, True), world)
        if world.rank == 1:
            monkeypatch.setattr(writing, "FileIO", full)
        with pytest.raises(
            CheckpointError, match=r"rank 1: .* iteration 2 .*No space left on device .*__1_0.*GiB are free"
        ) as caught:
            save_checkpoint(SaveRequest(tmp_path, 2, {}, Provenance()), held((2, 1, 1), world.rank, True), world)
        place = failed_rank(caught.value)
        assert (place.host, place.rank) == (socket.gethostname(), 1)
        world.barrier()
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [
            "iter_0000001",
            "latest_checkpointed_iteration.txt",
        ]

    on_ranks(2, save)
    verify_checkpoint(tmp_path / "iter_0000001")


def test_a_second_job_in_the_same_folder_is_reported(kit, tmp_path, monkeypatch):
    kit.save(tmp_path, 1)

    add_tensors = writing.CheckpointWriter.add_tensors

    def meanwhile(writer, tensors):
        remove_stale(tmp_path)  # as the other job's save begins
        add_tensors(writer, tensors)

    monkeypatch.setattr(writing.CheckpointWriter, "add_tensors", meanwhile)
    with pytest.raises(CheckpointError, match=r"iteration 2 in .*Only one job at a time may save.*End other jobs"):
        kit.save(tmp_path, 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]


def test_a_damaged_file_fails_the_load_on_every_rank(tmp_path, on_ranks):
    def save(world):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), held((2, 2, 1), world.rank, True), world)

    on_ranks(4, save)
    names = sorted(read_manifest(tmp_path / "iter_0000001").files)

    def load(world):
        for name in names:
            file = Path(tmp_path / "iter_0000001" / name)
            content = bytearray(file.read_bytes())
            world.barrier()
            if world.rank == 0:
                file.write_bytes(bytes([content[0] ^ 0x40]) + content[1:])
            world.barrier()
            with pytest.raises(CorruptCheckpointError, match=f"{name} is damaged"):
                load_checkpoint(tmp_path / "iter_0000001", held((1, 2, 1), world.rank, False), world)
            world.barrier()
            if world.rank == 0:
                file.write_bytes(content)
            world.barrier()

    on_ranks(2, load)


def test_a_saved_tensor_that_no_rank_has_is_refused(tmp_path, on_ranks):
    def save(world):
        save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), held((1, 2, 1), world.rank, True), world)

    def load(world):
        fewer = [tensor for tensor in held((1, 2, 1), world.rank, False) if tensor.name != "1.norm"]
        with pytest.raises(CheckpointError, match=r"tensors that this run does not have: 1\.norm"):
            load_checkpoint(tmp_path / "iter_0000001", fewer, world)

    on_ranks(2, save)
    on_ranks(2, load)


def test_two_writers_of_one_piece_are_an_error(tmp_path, on_ranks):
    def save(world):
        tensor = GlobalTensor("w", (4,), torch.float32, [Piece((0,), torch.zeros(4))])
        with pytest.raises(CheckpointError, match='"w": shards overlap at'):
            save_checkpoint(SaveRequest(tmp_path, 1, {}, Provenance()), [tensor], world)

    on_ranks(2, save)
    assert list(tmp_path.iterdir()) == []
