"""Packing benchmark: `data pack` against copying the same bytes, on synthetic documents of log-normal lengths.

    python benchmarks/data_packing.py [--documents 10000000] [--mean 250] [--seq-length 2048]

Prints seconds of both, the ratio, peak memory, and how many documents are cut with packing and without.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.preparation.packed_dataset import pack_dataset

EOD = 50256
TOKENIZER = {"type": "NullTokenizer", "fingerprint": "", "vocab_size": EOD + 1, "eod": EOD}
AT_ONCE = 1_000
"""Number of drawn lengths; they repeat after so many documents, in another order."""


def main() -> None:
    """Write a synthetic corpus, copy it, pack it, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--mean", type=float, default=250.0, help="tokens")
    parser.add_argument("--seq-length", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, packed = Path(folder) / "corpus", Path(folder) / "packed"
        synthesise(corpus, options.documents, options.mean)
        began = time.perf_counter()
        shutil.copyfile(f"{corpus}.bin", f"{packed}.copy")
        copied = time.perf_counter() - began
        began, cpu = time.perf_counter(), time.process_time()
        made = pack_dataset(IndexedDataset(corpus), str(packed), options.seq_length, TOKENIZER)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert made is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{made.documents:,} documents, {made.tokens:,} tokens, sequences of {options.seq_length}")
    print(f"copy {copied:.1f} s, pack {seconds:.1f} s ({cpu:.1f} s of processor): ratio {seconds / copied:.2f}")
    print(f"{made.tokens / cpu / 1e6:.0f} M tokens a second of processor, peak {peak:,.0f} MB")
    print(f"text {made.tokens / (made.bins * options.seq_length):.4%} of every sequence")
    print(
        f"documents cut: {made.cut / made.documents:.2%} packed, {made.cut_unpacked / made.documents:.2%} concatenated"
    )


def synthesise(prefix: Path, documents: int, mean: float) -> None:
    """Write documents of random tokens, whose lengths repeat in random order after AT_ONCE documents."""
    rng = np.random.default_rng(0)
    sigma = 1.0
    lengths = np.maximum(2, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, AT_ONCE)).astype(np.int64)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(-(-documents // AT_ONCE)):
            tokens = rng.integers(0, EOD, int(lengths.max()), dtype=np.uint16)
            tokens[-1] = EOD
            for length in rng.permutation(lengths).tolist():
                writer.add_document(tokens[-length:])


if __name__ == "__main__":
    main()
