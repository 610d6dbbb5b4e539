"""External shuffle of documents: random order with one bucket in memory at a time.

Each document draws a 64-bit key, and the output is sorted by key. First each unit sorts its own shard. Then each bucket
(a range of keys with about BUCKET_BYTES of tokens) reads its contiguous run of documents from every shard and sorts
them. Workers process buckets like units; the concatenated shards of the buckets are the shuffled dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.data.format.index_format import bin_path, idx_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.preparation.work_folder import Shard
from megatron_lite.runs.atomic import write_synced

BUCKET_BYTES = 128 << 20
CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Bucket:
    """Task: sort the documents of all shards whose keys are in the `index`-th of `count` equal ranges."""

    number: int
    index: int
    count: int
    shards: tuple[tuple[str, ...], ...]
    """Names of the sorted shards, by JSON key."""


def plan_buckets(first: int, shards: Sequence[Sequence[Shard]]) -> list[Bucket]:
    """Return the buckets for the shards of finished units, [units][JSON keys], numbered from `first`."""
    total = sum(shard.num_bytes for unit in shards for shard in unit)
    count = max(1, -(-total // BUCKET_BYTES))
    names = tuple(tuple(shard.name for shard in of_key) for of_key in zip(*shards, strict=True))
    return [Bucket(first + index, index, count, names) for index in range(count)]


class _Run(NamedTuple):
    """Contiguous documents of a shard: keys [documents], sequences, lengths and tokens."""

    order: npt.NDArray[np.uint64]
    sequences: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.generic]


def sort_shard(shard: Shard, order: npt.NDArray[np.uint64]) -> Shard:
    """Rewrite a shard with its documents sorted by `order`, [documents], and write the sorted keys to `.order`."""
    dataset = IndexedDataset(shard.name)
    name = f"{shard.name}s"
    positions = np.argsort(order, kind="stable")
    tokens = np.diff(np.concatenate((np.array([0]), np.cumsum(dataset.sizes, dtype=np.int64)))[dataset.document_index])
    checksum = 0
    with IndexedDatasetWriter(name, dataset.dtype) as writer:
        for documents in _chunks(positions, tokens[positions]):
            firsts, lasts = dataset.document_index[documents], dataset.document_index[documents + 1]
            sequences = [index for first, last in zip(firsts, lasts, strict=True) for index in range(first, last)]
            parts = [dataset.get(index) for index in sequences] or [np.empty(0, dataset.dtype)]
            lengths = dataset.sizes[sequences].astype(np.int64)
            checksum = writer.add_batch(np.concatenate(parts), lengths, lasts - firsts, checksum)
    write_synced(Path(f"{name}.order"), order[positions].tobytes())
    del dataset
    bin_path(shard.name).unlink()
    idx_path(shard.name).unlink()
    return Shard(name, writer.num_bytes, checksum, writer.extent)


def _chunks(positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Split documents into chunks of about CHUNK_TOKENS."""
    group = np.cumsum(tokens) // CHUNK_TOKENS
    return [chunk for chunk in np.split(positions, np.flatnonzero(np.diff(group)) + 1) if len(chunk)]


def write_bucket(bucket: Bucket, prefix: Path) -> list[Shard]:
    """Write the shards `{prefix}.{number of the JSON key}` of a bucket."""
    return [_write_key(bucket, names, f"{prefix}.{key}") for key, names in enumerate(bucket.shards)]


def _write_key(bucket: Bucket, names: Sequence[str], target: str) -> Shard:
    runs = [_read_run(name, bucket) for name in names]
    order = np.concatenate([run.order for run in runs])
    sequences = np.concatenate([run.sequences for run in runs])
    lengths = np.concatenate([run.lengths for run in runs])
    tokens = np.concatenate([run.tokens for run in runs])
    del runs
    positions = np.argsort(order, kind="stable")
    last = np.cumsum(sequences)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    checksum = 0
    with IndexedDatasetWriter(target, tokens.dtype) as writer:
        for chunk in _chunks(positions, (ends[last] - ends[last - sequences])[positions]):
            spans = [(last[i] - sequences[i], last[i]) for i in chunk.tolist()]
            part = np.concatenate([tokens[ends[a] : ends[b]] for a, b in spans])
            part_lengths = np.concatenate([lengths[a:b] for a, b in spans])
            checksum = writer.add_batch(part, part_lengths, sequences[chunk], checksum)
    return Shard(target, writer.num_bytes, checksum, writer.extent)


def _read_run(name: str, bucket: Bucket) -> _Run:
    """Read the documents of a sorted shard that are in the bucket, which are contiguous."""
    dataset = IndexedDataset(name)
    order = np.fromfile(f"{name}.order", np.uint64)
    low, high = (_boundary(bucket.index + step, bucket.count, order) for step in (0, 1))
    first, last = int(dataset.document_index[low]), int(dataset.document_index[high])
    lengths = dataset.sizes[first:last].astype(np.int64)
    start = int(dataset.pointers[first]) // dataset.dtype.itemsize if last > first else 0
    stored = np.fromfile(bin_path(name), dataset.dtype, count=int(lengths.sum()), offset=start * dataset.dtype.itemsize)
    return _Run(order[low:high], np.diff(dataset.document_index[low : high + 1]), lengths, stored)


def _boundary(index: int, count: int, order: npt.NDArray[np.uint64]) -> int:
    """Return the number of documents with a key below `index / count` of the range of keys."""
    if index == count:
        return len(order)
    return int(np.searchsorted(order, np.uint64((index << 64) // count)))
