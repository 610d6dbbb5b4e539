"""How long a save and a load take, against torch.save and torch.load of the same bytes, and what async hides.

    python benchmarks/checkpoint.py [--gigabytes 1] [--folder FOLDER] [--device cpu|cuda]

Everything runs in one process, one after the other, on the same tensors and disk; each save is on the disk (fsync)
before its clock stops, torch.save's too. Numbers of a laptop's page cache say little about a parallel file system, but
the ratios hold: what this package adds is one CRC-32 pass over the bytes in each direction.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.backend.group import LocalGroup
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.catalog import find_checkpoint
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.manifest import Provenance
from megatron_lite.checkpoint.retention import Retention
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.parallel.tensors import GlobalTensor, Piece

WORLD = LocalGroup("world")
COLUMNS = 2048


def main() -> None:
    """Prints one line per way of saving and loading, then the ratios."""
    options = _options()
    rows = round(options.gigabytes * 1e9 / 4 / COLUMNS / options.tensors)
    state = {
        f"decoder.layers.{number}.mlp.fc1.weight": torch.randn(rows, COLUMNS, device=options.device)
        for number in range(options.tensors)
    }
    size = sum(tensor.nbytes for tensor in state.values())
    print(f"{size / 1e9:.2f} GB in {len(state)} tensors on {options.device}, {options.repeats} times each, medians")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder))
    try:
        seconds = _measure(state, folder, options.repeats)
    finally:
        shutil.rmtree(folder)
    for name, value in seconds.items():
        print(f"{name:<44} {value:8.3f} s {size / value / 1e9:8.2f} GB/s")
    print(f"save against torch.save: {seconds['save'] / seconds['torch.save']:.2f} of the time")
    print(f"load against torch.load: {seconds['load'] / seconds['torch.load']:.2f} of the time")
    print(f"load in another layout against torch.load: {seconds['load, resharded'] / seconds['torch.load']:.2f}")
    print(f"blocking time, async against sync: {seconds['async save, training stands still'] / seconds['save']:.1%}")


def _measure(state: dict[str, Tensor], folder: Path, repeats: int) -> dict[str, float]:
    held = [_whole(name, tensor) for name, tensor in state.items()]
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    file, root = folder / "plain.pt", folder / "run"

    def plain_save() -> None:
        with file.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def plain_load() -> None:
        for name, tensor in torch.load(file, weights_only=True).items():
            target[name].copy_(tensor)

    def save() -> None:
        save_checkpoint(root, 1, held, {}, Provenance(), WORLD)

    def load(tensors: list[GlobalTensor]) -> None:
        path = find_checkpoint(str(root))
        assert path is not None
        load_checkpoint(path, tensors, WORLD)

    whole = [_whole(name, tensor) for name, tensor in target.items()]
    columns = [_columns(name, tensor) for name, tensor in target.items()]
    measured = {
        "torch.save": plain_save,
        "save": save,
        "torch.load": plain_load,
        "load": lambda: load(whole),
        "load, resharded": lambda: load(columns),
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    # In turn, so that a busy disk or machine is unfair to nobody; the first round is not counted. Every save writes new
    # files: to write over the old ones would spare the file system much of its work.
    for _ in range(repeats + 1):
        file.unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        for name, function in measured.items():
            os.sync()
            begun = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begun)
    seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
    blocked, total = [], []
    with BackgroundSaver(WORLD) as saver:
        # The first save allocates the host buffers that all later ones use.
        for number in range(repeats + 1):
            blocked.append(saver.save(root, 2 + number, held, {}, Provenance(), retention=Retention(last=1)))
            report = saver.wait()
            assert report is not None
            total.append(report.seconds)
    seconds["async save, training stands still"] = statistics.median(blocked[1:])
    seconds["async save, from call to announcement"] = statistics.median(total[1:])
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    return seconds


def _whole(name: str, tensor: Tensor) -> GlobalTensor:
    return GlobalTensor(name, tuple(tensor.shape), tensor.dtype, [Piece((0, 0), tensor)])


def _columns(name: str, tensor: Tensor) -> GlobalTensor:
    """The same tensor as four ranks' column shards, none of which is a contiguous part of what was saved."""
    width = tensor.shape[1] // 4
    pieces = [Piece((0, start), tensor[:, start : start + width]) for start in range(0, tensor.shape[1], width)]
    return GlobalTensor(name, tuple(tensor.shape), tensor.dtype, pieces)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of saving and loading against plain torch, in one run.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--tensors", type=int, default=64, help="tensors it is made of (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, after one that is not (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--device", default="cpu", help="where the tensors live (default: cpu)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
