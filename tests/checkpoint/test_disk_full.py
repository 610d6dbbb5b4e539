"""Tests of saves on a full disk: earlier checkpoints stay, partial ones do not, the error states the free room."""

from __future__ import annotations

import io
import multiprocessing
import re
import resource
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from megatron_lite.checkpoint import writing
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint

BEFORE = ["iter_0000001", "latest_checkpointed_iteration.txt"]


def names(root):
    return sorted(entry.name for entry in root.iterdir())


def test_a_save_without_room_is_refused_before_writing(kit, tmp_path, monkeypatch):
    kit.save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**21, 2**21))
    monkeypatch.setattr(writing.CheckpointWriter, "add_tensors", None)
    with pytest.raises(CheckpointError, match=r"iteration 2: it needs 4 MiB, and 2 MiB are free .*Earlier"):
        kit.save(tmp_path, 2, {"w": torch.zeros(2**20)})
    assert names(tmp_path) == BEFORE


@pytest.mark.parametrize("after", [0, 100_000, 300_000])
def test_the_disk_fills_while_tensors_are_written(kit, tmp_path, monkeypatch, after):
    kit.save(tmp_path, 1)
    room = after

    class FullDisk(io.FileIO):
        def write(self, data):
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(writing, "FileIO", FullDisk)
    with pytest.raises(
        CheckpointError,
        match=r"iteration 2 in .*No space left on device.*, although .* are free on its disk and"
        r" .*: the quota or the number of files is used up. See quota -s; ",
    ):
        kit.save(tmp_path, 2, {f"w{number}": torch.zeros(10_000) for number in range(10)})
    assert names(tmp_path) == BEFORE
    verify_checkpoint(find_checkpoint(str(tmp_path)))


STEPS = ("replace_file", "dcp_metadata", "write_synced", "make_visible", "sync_folder", "set_latest")


@pytest.mark.parametrize("step", STEPS)
def test_the_disk_fills_at_a_later_step(kit, tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    kit.save(tmp_path, 1)
    monkeypatch.setattr(writing, step, full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        kit.save(tmp_path, 2)
    assert names(tmp_path) == BEFORE


def save_with_limit(kit, root, results):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        kit.save(root, 2, {"w": torch.zeros(1_000_000)})
    except CheckpointError as error:
        results.put(str(error))


def test_a_file_size_limit_of_the_system(kit, tmp_path):
    """A real failure: the kernel itself refuses the write."""
    kit.save(tmp_path, 1)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=save_with_limit, args=(kit, tmp_path, results))
    child.start()
    message = results.get()
    child.join()
    assert "File too large" in message
    assert names(tmp_path) == BEFORE


def test_a_file_in_place_of_the_folder(kit, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        kit.save(tmp_path / "file" / "save", 1)


def test_an_undeletable_checkpoint_does_not_fail_the_save(kit, tmp_path, monkeypatch):
    kit.save(tmp_path, 1)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    report = kit.save(tmp_path, 2, keep_last=1)
    assert re.search(r"iter_0000001\.deleted-\w+ Permission denied", report.problem)
    assert find_checkpoint(str(tmp_path)).name == "iter_0000002"
