"""Tests of reshard and average: bounded memory and file sizes, no partial output after a failure."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.checkpoints import read_tensor

from megatron_lite.checkpoint import reading, tiles, writing
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.reading import compare_checkpoints
from megatron_lite.checkpoint.rewriting import average, reshard
from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.cli.checkpoint import run
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.manifest import CorruptCheckpointError, read_manifest

MIXED = {"w": torch.randn(300, 200).bfloat16(), "b": torch.randn(7), "ids": torch.arange(5)}
MAIN = {"optimizer.main_param.w": torch.randn(300, 200), "optimizer.exp_avg.w": torch.randn(300, 200)}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "MIN_TILE", 1 << 10)
    monkeypatch.setattr(tiles, "MAX_TILE", 1 << 13)


@pytest.fixture
def path(kit, tmp_path, small_tiles):
    return kit.save(tmp_path / "run", 3, {**MIXED, **MAIN}).path


def test_files_are_of_bounded_size_and_hold_the_same_bits(path, tmp_path):
    calls = []
    report = reshard(path, tmp_path / "new", file_size=100_000, progress=lambda *step: calls.append(step))
    manifest = verify_checkpoint(report.path)
    sizes = [file.size for name, file in manifest.files.items() if name.endswith(".distcp")]
    assert len(sizes) > 5
    assert max(sizes) <= 100_000
    assert min(sorted(sizes)[1:]) > 80_000
    assert all(difference.equal for difference in compare_checkpoints(path, report.path))
    assert manifest.tensors.keys() == read_manifest(path).tensors.keys()
    assert manifest.scalars == read_manifest(path).scalars
    # Each step is a tile: memory is that of one, however large the tensor.
    steps = [done - before for (done, _), (before, _) in zip(calls, [(0, 0), *calls], strict=False)]
    assert max(steps) <= 1 << 13
    assert calls[-1] == (calls[0][1],) * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_from_the_main_parameters(kit, path, tmp_path, dtype):
    new = reshard(path, tmp_path / "new", dtype=dtype).path
    manifest = verify_checkpoint(new)
    assert sorted(manifest.tensors) == ["b", "ids", "w"]
    assert read_tensor(new, "w").equal(MAIN["optimizer.main_param.w"].to(getattr(torch, dtype)))
    assert read_tensor(new, "b").equal(MIXED["b"].to(getattr(torch, dtype)))
    assert read_tensor(new, "ids").equal(MIXED["ids"])
    loaded = {"w": torch.zeros(300, 200), "b": torch.zeros(7), "ids": torch.zeros(5, dtype=torch.int64)}
    load_checkpoint(new, kit.held(loaded), kit.world)


def test_each_record_is_read_once(path, tmp_path, monkeypatch):
    read = []
    inner = reading.checked_parts

    def counted(path, parts):
        read.extend(parts)
        return inner(path, parts)

    monkeypatch.setattr(reading, "checked_parts", counted)
    reshard(path, tmp_path / "new")
    assert sorted(read, key=lambda part: part.start) == list(read_manifest(path).files["__0_0.distcp"].parts)


def test_an_existing_checkpoint_is_not_replaced(path, tmp_path):
    reshard(path, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"iter_0000003, exists already.*Give --output another folder"):
        reshard(path, tmp_path / "new")
    verify_checkpoint(tmp_path / "new" / "iter_0000003")


def test_the_folder_of_a_source_is_refused_as_output(kit, path, tmp_path):
    other = kit.save(tmp_path / "other", 4, {**MIXED, **MAIN}).path
    for folder in (path.parent, other.parent):
        with pytest.raises(CheckpointError, match="from which the command reads"):
            average([path, other], folder)


def test_a_checkpoint_is_refused_as_output(kit, path, tmp_path):
    other = kit.save(tmp_path, 5).path
    before = sorted(other.iterdir())
    with pytest.raises(CheckpointError, match=r"iter_0000005 has the name of a single checkpoint"):
        reshard(path, other)
    assert sorted(other.iterdir()) == before


def test_damage_is_reported_and_nothing_is_left(path, tmp_path):
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"__0_0\.distcp is damaged"):
        reshard(path, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_reported_and_nothing_is_left(path, tmp_path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 200_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(writing, "FileIO", FullDisk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        reshard(path, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_file_sizes_that_are_not_positive_are_refused(path, tmp_path, size, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["reshard", str(path), "--output", str(tmp_path / "new"), "--max-file-gb", size])
    assert stop.value.code == 2 and "--max-file-gb" in capsys.readouterr().err


@pytest.mark.parametrize("number", [1, 7, 23, 29, 39])
def test_ctrl_c_within_a_record_is_raised(path, tmp_path, monkeypatch, number):
    class Interrupted(io.FileIO):
        def write(self, data):
            # After some records, at each kind of place in the next.
            nonlocal number
            number -= 1
            if not number:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(writing, "FileIO", Interrupted)
    monkeypatch.setattr(writing, "_BUFFER", 1)
    with pytest.raises(KeyboardInterrupt):
        reshard(path, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(kit, tmp_path):
    path = kit.save(tmp_path / "run", 1, {str(number): torch.zeros(1 << 20) for number in range(100)}).path
    new = tmp_path / "new"
    command = [sys.executable, "-m", "megatron_lite", "checkpoint", "reshard", str(path), "--output", str(new)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(new.glob("iter_*.partial-*/*.distcp")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip() == "interrupted"
    assert not new.exists(), "the command removes the folder that it made"
    assert find_checkpoint(str(new)) is None


CODE = """
import sys
from pathlib import Path
from megatron_lite.checkpoint.rewriting import average, reshard
small, large, output = map(Path, sys.argv[1:])
# ru_maxrss outlives exec, so a child of a large process begins with its parent's; VmHWM is this program's own.
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10
reshard(small, output / "a")
average([small, small], output / "b")
begun = peak()
reshard(large, output / "c")
average([large, large], output / "d")
print(peak() - begun)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(kit, tmp_path):
    small = kit.save(tmp_path / "small", 1, {"w": torch.zeros(1024, 1 << 14)}).path
    large = kit.save(tmp_path / "large", 1, {"w": torch.zeros(1024, 1 << 16)}).path
    command = [sys.executable, "-c", CODE, str(small), str(large), str(tmp_path)]
    # What is freed goes back to the system at once, so that the peak is the memory in use at one time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    growth = int(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=120).stdout
    )
    # Tiles of both are of 4 MiB; the tensor of the larger is of 256.
    assert growth < 16e6
