"""Tests of asynchronous saving: consistent snapshots, reused buffers, failures on any rank."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import background
from megatron_lite.checkpoint.background import BackgroundSaver, host_buffers
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.checkpoint.writing import CheckpointWriter, SaveRequest
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.manifest import Provenance
from megatron_lite.runs.retention import Retention


@pytest.fixture
def write_allowed(monkeypatch):
    """Event that background writing waits for."""
    go = threading.Event()
    original = CheckpointWriter.add_tensors

    def write(*arguments):
        assert go.wait(20)
        original(*arguments)

    monkeypatch.setattr(CheckpointWriter, "add_tensors", write)
    return go


def test_later_changes_of_tensors_and_scalars_are_not_saved(kit, tmp_path, write_allowed):
    tensors, scalars = kit.tensors(), {"progress": {"iteration": 1}}
    with BackgroundSaver(kit.world) as saver:
        saver.save(SaveRequest(tmp_path, 1, scalars, Provenance(), retention=Retention(last=3)), kit.held(tensors))
        for tensor in tensors.values():
            tensor.add_(1000)
        scalars["progress"]["iteration"] = 2
        assert find_checkpoint(str(tmp_path)) is None
        write_allowed.set()
        report = saver.wait()
        assert saver.wait() is None
    assert report.path == find_checkpoint(str(tmp_path))
    assert 0 < report.blocking_seconds < report.seconds
    loaded = kit.zeros_like(tensors)
    assert load_checkpoint(report.path, kit.held(loaded), kit.world) == {"progress": {"iteration": 1}}
    assert all(loaded[name].equal(tensor) for name, tensor in kit.tensors().items())


def test_a_save_waits_for_the_previous_one(kit, tmp_path, write_allowed):
    with BackgroundSaver(kit.world) as saver:
        saver.save(SaveRequest(tmp_path, 1, {}, Provenance()), kit.held(kit.tensors(1)))
        threading.Timer(0.2, write_allowed.set).start()
        saver.save(SaveRequest(tmp_path, 2, {}, Provenance()), kit.held(kit.tensors(2)))
        assert find_checkpoint(str(tmp_path), 1) is not None
    for iteration in (1, 2):
        loaded = kit.zeros_like(kit.tensors())
        load_checkpoint(find_checkpoint(str(tmp_path), iteration), kit.held(loaded), kit.world)
        assert all(loaded[name].equal(tensor) for name, tensor in kit.tensors(iteration).items())


def test_host_buffers_are_reused(kit, tmp_path, monkeypatch):
    addresses = []
    original = CheckpointWriter.add_tensors

    def write(writer, tensors):
        addresses.append([piece.tensor.data_ptr() for tensor in tensors for piece in tensor.pieces])
        original(writer, tensors)

    monkeypatch.setattr(CheckpointWriter, "add_tensors", write)
    with BackgroundSaver(kit.world) as saver:
        for iteration in (1, 2, 3):
            saver.save(SaveRequest(tmp_path, iteration, {}, Provenance()), kit.held(kit.tensors(iteration)))
    assert len(addresses) == 3
    assert addresses[0] == addresses[1] == addresses[2]


class OnGpu(torch.Tensor):
    """Tensor that says that it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.fixture
def allocations(monkeypatch):
    """Sizes of pinned allocations, which this machine cannot make."""
    found, plain = [], torch.empty

    def empty(*size, pin_memory=False, **options):
        found.append((size, pin_memory))
        return plain(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    return found


def test_tensors_of_a_gpu_share_pinned_chunks(monkeypatch, allocations):
    monkeypatch.setattr(background, "_CHUNK", 1024)
    shapes = [((8, 16), torch.float32), ((5,), torch.bfloat16), ((400,), torch.float32), ((3, 0), torch.int8)]
    tensors = [torch.zeros(shape, dtype=dtype).as_subclass(OnGpu) for shape, dtype in shapes]
    buffers = host_buffers(tensors)
    assert [(tuple(buffer.shape), buffer.dtype) for buffer in buffers] == shapes
    assert allocations == [((576,), True), ((1600,), True)]
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    assert [buffer.float().unique().tolist() for buffer in buffers] == [[0], [1], [2], []]
    assert all(buffer.data_ptr() % buffer.element_size() == 0 for buffer in buffers)


def test_copies_from_a_gpu_are_awaited_once(kit, tmp_path, monkeypatch, allocations):
    waits, copies, plain = [], [], torch.Tensor.copy_

    def copy_(buffer, tensor, non_blocking=False):
        copies.append(non_blocking)
        return plain(buffer, tensor.as_subclass(torch.Tensor))

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(len(copies)))
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    tensors = [
        GlobalTensor(name, (4,), torch.float32, [Piece((0,), torch.full((4,), value).as_subclass(OnGpu))])
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    staged = BackgroundSaver(kit.world)._stage(tensors)
    assert copies == [True, True] and waits == [2]
    assert [tensor.pieces[0].tensor.tolist() for tensor in staged] == [[1.0] * 4, [2.0] * 4]


def test_a_failure_is_raised_once_by_the_next_save(kit, tmp_path, monkeypatch):
    def full(*_):
        raise CheckpointError("Cannot write the checkpoint: No space left on device", fix="Make room")

    saver = BackgroundSaver(kit.world)
    saver.save(SaveRequest(tmp_path, 1, {}, Provenance()), kit.held(kit.tensors()))
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "add_tensors", full)
        saver.save(SaveRequest(tmp_path, 2, {}, Provenance()), kit.held(kit.tensors()))
        saver._thread.join()
    assert saver.failed
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save(SaveRequest(tmp_path, 3, {}, Provenance()), kit.held(kit.tensors()))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert not saver.failed
    saver.save(SaveRequest(tmp_path, 4, {}, Provenance()), kit.held(kit.tensors()))
    assert saver.wait().path.name == "iter_0000004"


def test_an_error_in_training_abandons_the_save(kit, tmp_path):
    with pytest.raises(RuntimeError, match="training"), BackgroundSaver(kit.world) as saver:
        saver.save(SaveRequest(tmp_path, 1, {}, Provenance()), kit.held(kit.tensors()))
        raise RuntimeError("training failed")


def halves(world, value):
    tensor = torch.full((3,), value + world.rank)
    return [GlobalTensor("w", (6,), tensor.dtype, [Piece((3 * world.rank,), tensor)])]


def test_several_ranks_save(tmp_path, on_ranks):
    def run(world):
        with BackgroundSaver(world) as saver:
            for iteration in (1, 2, 3):
                tensors = halves(world, 10.0 * iteration)
                saver.save(SaveRequest(tmp_path, iteration, {}, Provenance(), retention=Retention(last=2)), tensors)
                tensors[0].pieces[0].tensor.fill_(-1)
            report = saver.wait()
            assert report is not None
        loaded = halves(world, 0.0)
        load_checkpoint(find_checkpoint(str(tmp_path)), loaded, world)
        assert loaded[0].pieces[0].tensor.tolist() == [30.0 + world.rank] * 3

    on_ranks(2, run)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    verify_checkpoint(tmp_path / "iter_0000003")


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path, on_ranks, monkeypatch):
    def full(*_):
        raise CheckpointError("Cannot write the checkpoint: No space left on device", fix="Make room")

    def run(world):
        saver = BackgroundSaver(world)
        if world.rank == 1:
            monkeypatch.setattr(CheckpointWriter, "add_tensors", full)
        saver.save(SaveRequest(tmp_path, 1, {}, Provenance()), halves(world, 1.0))
        with pytest.raises(CheckpointError, match=r"rank 1.*No space left on device"):
            saver.wait()

    on_ranks(2, run)
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.slow
def test_a_missing_rank_is_named(tmp_path, on_ranks, monkeypatch):
    def run(world):
        saver = BackgroundSaver(world, patience=0.2)
        if world.rank == 1:
            monkeypatch.setattr(CheckpointWriter, "close", lambda *_: time.sleep(0.6))
        saver.save(SaveRequest(tmp_path, 1, {}, Provenance()), halves(world, 1.0))
        with pytest.raises(CheckpointError, match=r"The parts of rank 1 of the checkpoint .* are missing after 0 s"):
            saver.wait()

    on_ranks(2, run)


# The suite makes a few of them; MEGATRON_LITE_SAVES=200 is the full measurement.
SAVES = 30


def resident():
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat_over_many_saves(kit, tmp_path):
    tensors = kit.held({f"w{number}": torch.randn(256, 1024) for number in range(8)})
    with BackgroundSaver(kit.world) as saver:
        for iteration in range(1, int(os.environ.get("MEGATRON_LITE_SAVES", SAVES)) + 1):
            saver.save(SaveRequest(tmp_path, iteration, {}, Provenance(), retention=Retention(last=1)), tensors)
            saver.wait()
            if iteration == 10:
                after_ten = resident()
    grown = resident() - after_ten
    print(f"{iteration} saves: resident memory {after_ten / 2**20:.1f} MiB after ten, then {grown / after_ten:+.2%}")
    assert grown < 0.02 * after_ten
