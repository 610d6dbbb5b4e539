"""Benchmark of micro-batches on the tensor-parallel ranks of a host: each reads its own, or one reads and broadcasts.

    python benchmarks/batch_reading.py [--ranks 4] [--micro-batch 8] [--seq-length 2048]

Prints the time of a micro-batch in both ways, on gloo ranks, and the bytes that the disk delivers if all ranks read the
same samples of a file that is not in the page cache.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.serving.closed_form import ClosedFormDataset
from megatron_lite.data.serving.loader import Loader
from megatron_lite.train.batches import BatchParts, RunData

TOKENS = 32 << 20
"""Tokens of the dataset, 2 bytes each."""
REPEATS = 100


def main() -> None:
    """Write a dataset, start the ranks and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, choices=range(2, 65), metavar="N")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        prefix = Path(folder) / "corpus"
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for document in np.random.default_rng(0).integers(0, 50_000, (64, TOKENS // 64)):
                writer.add_document(document)
        leave_page_cache(bin_path(prefix))
        context, pipes = multiprocessing.get_context("fork"), []
        for rank in range(args.ranks):
            here, there = context.Pipe()
            context.Process(
                target=measure, args=(rank, args.ranks, prefix, args.micro_batch, args.seq_length, there), daemon=True
            ).start()
            there.close()
            pipes.append(here)
        results = [pipe.recv() for pipe in pipes]
    delivered, reading, broadcast = results[0][0], *(max(result[n] for result in results) for n in (1, 2))
    held = REPEATS * args.micro_batch * (args.seq_length + 1) * 2
    print(f"{args.ranks} ranks, micro-batches of {args.micro_batch} x {args.seq_length} tokens, medians of {REPEATS}")
    print(f"reading and converting on every rank {reading * 1e6:.0f} us, in the read-ahead thread")
    print(
        f"broadcasting tokens and labels {broadcast * 1e6:.0f} us, in the way of training: {broadcast / reading:.2f} x"
    )
    print(f"disk: {delivered / held:.2f} x the bytes of one rank's samples, delivered to all ranks together")


def measure(rank: int, ranks: int, prefix: Path, size: int, length: int, pipe: Connection) -> None:
    """Measure one rank: bytes from the disk on all ranks, seconds to read a micro-batch, seconds to broadcast it."""
    torch.set_num_threads(1)
    launch = Launch(rank=rank, world_size=ranks, local_world_size=ranks, init_method=f"file://{prefix.parent}/store")
    backend = select_backend(RuntimeConfig(device="cpu", num_threads=1), ParallelConfig(world_size=ranks), launch)
    dataset = ClosedFormDataset(IndexedDataset(prefix), (0, 64), None, length, 1)
    loader = Loader(dataset, micro_batch=size, global_batch=lambda _: size)
    data = RunData(backend, BatchParts(), -1, 0, loader)
    before = disk_bytes()
    batch, reading = None, []
    for repeat in range(2 * REPEATS):  # first from the disk, then from the page cache
        if repeat == REPEATS:
            delivered = torch.tensor(disk_bytes() - before)
            dist.all_reduce(delivered)
        begun = time.perf_counter()
        batch = data.reader(loader, repeat % REPEATS * size, length)(0)
        reading.append(time.perf_counter() - begun)
    assert batch is not None and batch.tokens is not None and batch.labels is not None
    broadcast = []
    for _ in range(REPEATS):
        dist.barrier()
        begun = time.perf_counter()
        dist.broadcast(batch.tokens, 0)
        dist.broadcast(batch.labels, 0)
        broadcast.append(time.perf_counter() - begun)
    pipe.send((int(delivered), statistics.median(reading[REPEATS:]), statistics.median(broadcast)))
    dist.barrier()


def leave_page_cache(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """Return the bytes that the storage has delivered to this process."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


if __name__ == "__main__":
    main()
