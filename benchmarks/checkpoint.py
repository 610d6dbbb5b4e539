"""Benchmark of checkpoints: saves and loads against torch.save and torch.load, blocking time of asynchronous saves.

    python benchmarks/checkpoint.py [--gigabytes 1] [--folder FOLDER] [--device cpu|cuda]
    python benchmarks/checkpoint.py --layouts [--folder FOLDER]

The first runs in one process, one after the other, on the same tensors and disk; each save, torch.save's included, is
timed until it is on the disk (fsync). Absolute times of a page cache do not transfer to a parallel file system,
but the ratios do: this package adds one CRC-32 pass over the bytes in each direction.

The second saves in one layout, loads in another on gloo ranks, and prints the bytes that each rank read (as Linux
counts them) relative to its tensors, and its memory beyond them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from megatron_lite.backend.group import Group, LocalGroup, new_process_group
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.load import load_checkpoint
from megatron_lite.checkpoint.rewriting import reshard
from megatron_lite.checkpoint.save import deduplicate, save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.parallel.tensors import GlobalTensor, Piece
from megatron_lite.runs.catalog import find_checkpoint
from megatron_lite.runs.manifest import Provenance, read_manifest
from megatron_lite.runs.retention import Retention

WORLD = LocalGroup("world")
COLUMNS = 2048
LAYERS, HIDDEN = 4, 2048


def main() -> None:
    """Print one line per way of saving and loading, then the ratios."""
    options = _options()
    if options.layouts:
        _print_layouts(options.folder)
        return
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
    both = seconds["torch.load"] + seconds["torch.save"]
    print(f"checkpoint reshard against torch.load and torch.save: {seconds['checkpoint reshard'] / both:.2f}")
    print(f"blocking time, async against sync: {seconds['async save, training blocked'] / seconds['save']:.1%}")


def _measure(state: dict[str, Tensor], folder: Path, repeats: int) -> dict[str, float]:
    held = [_whole(name, tensor) for name, tensor in state.items()]
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    file, root, rewritten = folder / "plain.pt", folder / "run", folder / "rewritten"

    def plain_save() -> None:
        with file.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def plain_load() -> None:
        for name, tensor in torch.load(file, weights_only=True).items():
            target[name].copy_(tensor)

    def save() -> None:
        save_checkpoint(SaveRequest(root, 1, {}, Provenance()), held, WORLD)

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
        "checkpoint reshard": lambda: _rewrite(root / "iter_0000001", rewritten),
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    # In turn, so that a busy disk or machine affects all alike; the first round is not counted. Every save writes new
    # files, because overwriting old ones would spare the file system much of its work.
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
            blocked.append(
                saver.save(SaveRequest(root, 2 + number, {}, Provenance(), retention=Retention(last=1)), held)
            )
            report = saver.wait()
            assert report is not None
            total.append(report.seconds)
    seconds["async save, training blocked"] = statistics.median(blocked[1:])
    seconds["async save, from call to announcement"] = statistics.median(total[1:])
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    return seconds


def _rewrite(path: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    reshard(path, output)


def _whole(name: str, tensor: Tensor) -> GlobalTensor:
    return GlobalTensor(name, tuple(tensor.shape), tensor.dtype, [Piece((0, 0), tensor)])


def _columns(name: str, tensor: Tensor) -> GlobalTensor:
    """Return the same tensor as four ranks' column shards, none of which is contiguous in the file."""
    width = tensor.shape[1] // 4
    pieces = [Piece((0, start), tensor[:, start : start + width]) for start in range(0, tensor.shape[1], width)]
    return GlobalTensor(name, tuple(tensor.shape), tensor.dtype, pieces)


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; with dp > 1 the moments are split over it, as ZeRO-1 does."""

    tp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.dp * self.pp

    def held(self, rank: int) -> list[GlobalTensor]:
        """Weights and moments of the rank's MLPs: the first matrix split by rows over tp, the second by columns."""
        t, d, p = rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)
        weights: list[GlobalTensor] = []
        moments: list[GlobalTensor] = []
        for layer in range(p * LAYERS // self.pp, (p + 1) * LAYERS // self.pp):
            for name, shape, dim in (("fc1", (4 * HIDDEN, HIDDEN), 0), ("fc2", (HIDDEN, 4 * HIDDEN), 1)):
                local = [size // self.tp if axis == dim else size for axis, size in enumerate(shape)]
                offset = tuple(t * local[dim] if axis == dim else 0 for axis in range(2))
                for kind, into in (("", weights), ("optimizer.exp_avg.", moments), ("optimizer.exp_avg_sq.", moments)):
                    piece = Piece(offset, torch.ones(local))
                    full = f"{kind}decoder.layers.{layer}.mlp.{name}.weight"
                    into.append(GlobalTensor(full, shape, torch.float32, [piece], d == 0, (d, self.dp)))
        parts = [
            replace(tensor, pieces=[Piece(p.offset, p.tensor.clone()) for p in tensor.pieces], replica=(0, 1))
            for tensor in deduplicate(moments)
        ]
        return weights + parts

    def __str__(self) -> str:
        sizes = [f"{axis}{size}" for axis, size in asdict(self).items() if size > 1]
        return " ".join(sizes) + (" ZeRO-1" if self.dp > 1 else "") or "1 rank"


CHANGES = (
    (Layout(), Layout(tp=4)),
    (Layout(), Layout(dp=4)),
    (Layout(), Layout(pp=4)),
    (Layout(tp=4), Layout()),
    (Layout(dp=4), Layout(tp=4)),
)


def _print_layouts(parent: Path | None) -> None:
    print(
        "saved by -> loaded by      held by a rank   read / held   all ranks' reads / checkpoint   memory beyond held"
    )
    for saved, loaded in CHANGES:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=parent))
        try:
            _on_ranks(saved.world, _save_layout, saved, folder)
            _on_ranks(loaded.world, _load_layout, loaded, folder)
            ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(loaded.world)]
            size = read_manifest(folder / "iter_0000001").size
        finally:
            shutil.rmtree(folder)
        ratio = max(rank["read"] / rank["held"] for rank in ranks)
        total = sum(rank["read"] for rank in ranks) / size
        held, extra = (max(rank[key] for rank in ranks) / 1e6 for key in ("held", "memory"))
        print(f"{saved!s:>12} -> {loaded!s:<11} {held:12.0f} MB {ratio:13.3f} {total:31.3f} {extra:17.1f} MB")


def _save_layout(layout: Layout, folder: Path, world: Group) -> None:
    save_checkpoint(SaveRequest(folder, 1, {}, Provenance()), layout.held(world.rank), world)


def _load_layout(layout: Layout, folder: Path, world: Group) -> None:
    tensors = layout.held(world.rank)
    # Allocate what a load uses besides the tensors, so that it does not count.
    world.all_gather_object(None)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    memory, read = _linux("status", "VmHWM") << 10, _linux("io", "rchar")
    load_checkpoint(folder / "iter_0000001", tensors, world)
    figures = {
        "memory": (_linux("status", "VmHWM") << 10) - memory,
        "read": _linux("io", "rchar") - read,
        "held": sum(piece.tensor.nbytes for tensor in tensors for piece in tensor.pieces),
    }
    (folder / f"{world.rank}.json").write_text(json.dumps(figures), encoding="utf-8")


def _linux(file: str, key: str) -> int:
    """Return a figure of this process from /proc."""
    lines = Path("/proc/self", file).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _on_ranks(count: int, function: Callable[[Layout, Path, Group], None], layout: Layout, folder: Path) -> None:
    store = folder / f"store-{function.__name__}"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, count, store, function, layout, folder)) for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not any(rank.exitcode for rank in ranks)


def _rank(
    rank: int, count: int, store: Path, function: Callable[[Layout, Path, Group], None], layout: Layout, folder: Path
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    function(layout, folder, new_process_group("world", (tuple(range(count)),), rank))
    torch.distributed.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time of saving and loading against plain torch, in one run.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--tensors", type=int, default=64, help="tensors it is made of (default: 64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, after one that is not (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--device", default="cpu", help="where the tensors live (default: cpu)")
    parser.add_argument("--layouts", action="store_true", help="what ranks of other layouts read, instead of times")
    return parser.parse_args()


if __name__ == "__main__":
    main()
