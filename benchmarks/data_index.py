"""Sample-index benchmark: time to the first sample at the size of OSCAR, and samples per second of the loader.

    python benchmarks/data_index.py                          # 300 million documents and samples: 14 GB of disk
    python benchmarks/data_index.py --documents 3000000      # the same in a few seconds
    python benchmarks/data_index.py --order closed-form      # --sample-order closed-form: 6 GB of disk

The lengths are synthesised; the .bin is a sparse file, which takes no disk. Run it alone, with one core to itself
(`taskset -c 0`): the figures are of a single process.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.data.format.index_format import bin_path, idx_path, pack_header
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.blending import BlendIndex, normalize
from megatron_lite.data.order.index_cache import Notices, read_index, write_index
from megatron_lite.data.order.sample_index import (
    IndexPlan,
    SampleIndex,
    build_index,
    order_documents,
    order_samples,
    plan_index,
)
from megatron_lite.data.serving.build import build_datasets
from megatron_lite.data.serving.closed_form import ClosedFormDataset
from megatron_lite.data.serving.dataset import Dataset, GPTDataset
from megatron_lite.data.serving.loader import Loader

CHUNK = 1 << 20

PROBED = 1 << 24
"""Random words drawn, and entries moved, to measure the cost of one."""

SAMPLES_PER_SECOND_13B = 4.0
"""Upper estimate of the samples of 2048 tokens per second of an 8-GPU replica of a 13B model."""


def main() -> None:
    """Build, read, write and reopen an index; print seconds, memory and samples per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300_000_000)
    parser.add_argument("--samples", type=int, default=0, help="0: as many as documents")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--mean-length", type=int, default=2200, help="mean tokens of a document")
    parser.add_argument("--folder", default=None, help="where the temporary files go")
    parser.add_argument("--order", choices=("legacy", "closed-form"), default="legacy")
    options = parser.parse_args()
    samples = options.samples or options.documents
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = Path(folder) / "synthetic"
        with timed("synthesise the .idx (not counted)"):
            # In a process of its own: its memory is not this one's peak.
            process = multiprocessing.Process(target=synthesise, args=(prefix, options.documents, options.mean_length))
            process.start()
            process.join()
        if options.order == "closed-form":
            serve(first_sample_without_index(prefix, samples, options.seq_length))
            return
        index_and_serve(prefix, samples, options.seq_length)
        synthesise(prefix, options.documents // 10, options.mean_length)
        against_plain(IndexedDataset(prefix), samples // 10, options.seq_length)
    blend()


def first_sample_without_index(prefix: Path, samples: int, length: int) -> Dataset:
    """Measure the start of a run with --sample-order closed-form: open, check, plan, and read one sample."""
    config = RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=50_304),
        batch=BatchConfig(seq_length=length, micro_batch_size=4, global_batch_size=4),
        training=TrainingConfig(train_samples=samples, eval_iters=0),
        data=DataConfig(sources=(DataSource(path=str(prefix)),), index_order="closed-form"),
    )
    before, began, worked = set(prefix.parent.iterdir()), time.perf_counter(), time.process_time()
    datasets = build_datasets(config)
    train, plan = datasets.train, datasets.plans["train"]["train"]
    assert train is not None
    train[0]
    print(
        f"FIRST SAMPLE after {time.perf_counter() - began:.3f} s ({time.process_time() - worked:.3f} s of processor), "
        f"peak memory {1000 * peak_gigabytes():.0f} MB (limits: 1 s, 200 MB); {plan.sources[0].size:,} samples an epoch"
    )
    with timed("a sample of the 1,000th epoch"):
        ClosedFormDataset(plan.sources[0].data, plan.sources[0].bounds, 1001 * plan.sources[0].size, length, 1234)[
            1000 * plan.sources[0].size
        ]
    assert set(prefix.parent.iterdir()) == before, "no file is written"
    return train


def against_plain(data: IndexedDataset, samples: int, length: int) -> None:
    """Compare the build with Megatron's procedure in numpy, both at a tenth of the size."""
    plan = plan_index(
        data.sizes, (0, len(data)), num_samples=samples, seq_length=length, seed=1234, order="legacy", prefix="plain"
    )
    began = time.process_time()
    ours = build_index(plan, data.sizes)
    middle = time.process_time()
    rng = np.random.RandomState(plan.seed)
    documents = np.tile(np.arange(plan.num_documents, dtype=np.int32), plan.epochs)
    rng.shuffle(documents)
    ends = np.concatenate([[0], np.cumsum(data.sizes[documents], dtype=np.int64)])
    tokens = np.arange(plan.total_samples + 1) * length
    positions = np.searchsorted(ends, tokens, side="right") - 1
    rows = np.stack([positions, tokens - ends[positions]], axis=1).astype(np.int32)
    shuffle = np.arange(plan.total_samples, dtype=np.uint32)
    rng.shuffle(shuffle)
    plain, our = time.process_time() - middle, middle - began
    assert not plan.separate_last_epoch
    assert np.array_equal(documents, ours.documents)
    assert np.array_equal(shuffle, ours.shuffle)
    assert ours.locate(plan.total_samples // 3, data.sizes) == tuple(rows[plan.total_samples // 3])
    print(f"AT A TENTH OF THE SIZE: ours {our:.2f} s of processor, plain numpy {plain:.2f} s: ratio {plain / our:.1f}")


def plan_for(data: IndexedDataset, samples: int, length: int) -> IndexPlan:
    """Return the plan of the whole file in Megatron-DeepSpeed's order."""
    return plan_index(
        data.sizes,
        (0, len(data)),
        num_samples=samples,
        seq_length=length,
        seed=1234,
        order="legacy",
        prefix=data.prefix,
    )


def index_and_serve(prefix: Path, samples: int, length: int) -> None:
    """Measure the stages to the first sample, without and with a cached index."""
    began, worked = time.perf_counter(), time.process_time()
    with timed("open and check"):
        data = IndexedDataset(prefix)
    with timed("count tokens"):
        plan = plan_for(data, samples, length)
    print(f"  {plan.epochs} epochs, {plan.total_samples:,} samples, {plan.tokens_per_epoch:,} tokens an epoch")
    index = build(plan, data)
    with timed("first sample"):
        GPTDataset(data, index)[0]
    print(
        f"FIRST SAMPLE after {time.perf_counter() - began:.1f} s ({time.process_time() - worked:.1f} s of processor), "
        f"peak memory {peak_gigabytes():.2f} GB"
    )
    with timed("write the index (once)"):
        write_index(index, prefix.parent / "index", Notices())
    first_spans = index.spans(samples // 2, data.sizes)
    del index
    began = time.perf_counter()
    data = IndexedDataset(prefix)
    again = plan_for(data, samples, length)
    found = read_index(again, prefix.parent / "index", Notices())
    assert found is not None
    dataset = GPTDataset(data, found)
    dataset[0]
    print(f"REOPENED: first sample after {time.perf_counter() - began:.2f} s")
    assert found.spans(samples // 2, data.sizes) == first_spans
    serve(dataset)
    del dataset, found
    parts_of_a_build(plan.epochs * plan.num_documents, plan.total_samples)


def build(plan: IndexPlan, data: IndexedDataset) -> SampleIndex:
    """Build an index as build_index does, and measure its two halves."""
    rng = np.random.RandomState(plan.seed)
    scratch = np.empty(max(plan.epochs * plan.num_documents, plan.total_samples), dtype=np.int64)
    with timed("build: shuffle documents, sum their lengths"):
        documents, starts = order_documents(rng, plan, data.sizes, scratch)
    with timed("build: shuffle samples"):
        shuffle = order_samples(rng, plan, scratch)
    return SampleIndex(plan, documents, shuffle, starts)


def parts_of_a_build(entries: int, samples: int) -> None:
    """Measure the elementary operations of a build at the current speed of the core, which other processes may share.

    The order is defined by one sequence of random words, nearly all of which come before the first sample's number is
    known; and where a sample lies is known only when every document has been moved. Batches of independent moves, as
    here, are numpy's best case: no move waits for another, nor for its word.
    """
    words = words_of_shuffle(entries) + words_of_shuffle(samples)
    rng = np.random.RandomState(0)
    began = time.process_time()
    for _ in range(PROBED // CHUNK):
        rng.randint(0, 2**32, CHUNK, dtype=np.uint32)
    drawing = (time.process_time() - began) / PROBED * words
    values = np.ones(entries, dtype=np.int64)
    places = [rng.randint(0, entries, CHUNK >> 6) for _ in range(PROBED // CHUNK << 6)]
    began = time.process_time()
    for some in places:
        values[some] = values.take(some)
    moving = (time.process_time() - began) / PROBED * entries
    print(
        f"FOR COMPARISON: {words / 1e6:,.0f} million words, only drawn: {drawing:.1f} s; {entries / 1e6:,.0f} million "
        f"entries moved once, by independent gathers and scatters: {moving:.1f} s of processor"
    )


def words_of_shuffle(entries: int) -> float:
    """Return the expected random words of numpy's shuffle: 2 ** bits(i) / (i + 1) in step i (rejection sampling)."""
    words, low = 0.0, 1
    while low < entries:
        high = min(entries, 2 * low)
        words += 2 * low * math.log((high + 0.5) / (low + 0.5))
        low = high
    return words


def serve(dataset: Dataset) -> None:
    """Measure samples per second of the loader."""
    count = min(2000, len(dataset))
    loader = Loader(dataset, micro_batch=4, global_batch=lambda consumed: 4)
    began = time.perf_counter()
    for consumed in range(0, count, 4):
        loader.microbatch(consumed, 0)
    rate = count / (time.perf_counter() - began)
    print(
        f"LOADER: {rate:,.0f} samples/s from one thread; a 13B replica of 8 GPUs takes {SAMPLES_PER_SECOND_13B:.0f}: "
        f"{SAMPLES_PER_SECOND_13B / rate:.2%} of a step"
    )


def blend(sample: int = 100_000_000) -> None:
    """Measure the first lookup far into a blend, as in a resumed run."""
    for sources in (2, 5):
        index = BlendIndex(normalize(np.random.RandomState(sources).dirichlet(np.ones(sources)).tolist()))
        with timed(f"blend of {sources}: reach sample {sample:,}"):
            index.lookup(sample)


def synthesise(prefix: Path, documents: int, mean: int) -> None:
    """Write an .idx of log-normal lengths, and a sparse .bin."""
    rng = np.random.default_rng(0)
    sizes = np.empty(documents, dtype=np.int32)
    for low in range(0, documents, CHUNK):
        part = rng.lognormal(0.0, 1.0, min(CHUNK, documents - low)) * (mean / np.exp(0.5))
        sizes[low : low + CHUNK] = np.clip(part, 1, 1 << 20)
    with idx_path(prefix).open("wb") as file:
        file.write(pack_header(np.dtype("<u2"), documents, documents + 1))
        sizes.tofile(file)
        end = 0
        for low in range(0, documents, CHUNK):
            ends = end + np.cumsum(sizes[low : low + CHUNK], dtype=np.int64) * 2
            np.concatenate([[end], ends[:-1]]).tofile(file)
            end = int(ends[-1])
        for low in range(0, documents + 1, CHUNK):
            np.arange(low, min(documents + 1, low + CHUNK)).tofile(file)
    with bin_path(prefix).open("wb") as file:
        file.truncate(end)


def peak_gigabytes() -> float:
    """Return the peak memory of this process, including mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print the wall time and the processor time of a stage (more reliable on a shared machine)."""
    began, worked = time.perf_counter(), time.process_time()
    yield
    wall, processor = time.perf_counter() - began, time.process_time() - worked
    print(f"  {wall:8.2f} s ({processor:7.2f} s of processor)  {what}", flush=True)


if __name__ == "__main__":
    main()
