"""Preprocessing benchmark: against the tokenizer libraries alone, the design of Megatron's tools, and more workers.

    python benchmarks/preprocess.py                 rates and ratios, about two minutes
    python benchmarks/preprocess.py --memory        peak memory at 200 MB and 2 GB of input, about four minutes

The text is this Python's standard library. Rates are of text (UTF-8), best of `--repeats`, in turns in one process;
what needs no such length reads only the text's beginning, so that ours can be given enough to make its start small.
What is said per core is reckoned in CPU seconds, of all processes, so it holds on a busy machine as well. Two workers
against one is wall-clock time and needs two idle cores; the most to expect is the rate of two independent runs at once,
each of half the text.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.run import preprocess
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer
from megatron_lite.tokenizer.huggingface import read_gpt2
from megatron_lite.tokenizer.training import train_byte_level_bpe

MEMORY_TEXT = 4e6
"""Bytes of text repeated as the input of --memory, which does not depend on the content."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=1000, help="text that the fast sides read (1000)")
    parser.add_argument("--slow-mb", type=float, default=30, help="text that the slow sides read (30)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vocab-file", default="", help="vocab.json; without it a BPE of 8192 is trained")
    parser.add_argument("--merge-file", default="")
    parser.add_argument("--memory", action="store_true", help="only measure peak memory")
    parser.add_argument("--memory-mb", type=float, nargs=2, default=(200, 2000), help="the two sizes of input")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        texts = standard_library(MEMORY_TEXT if args.memory else args.mb * 1e6)
        config = tokenizer_config(args.vocab_file, args.merge_file, texts, Path(folder))
        if args.memory:
            compare_memory(texts, config, Path(folder), args.memory_mb)
        else:
            compare_rates(texts, standard_library(args.slow_mb * 1e6), config, Path(folder), args.repeats)


def standard_library(num_bytes: float) -> list[str]:
    """Return Python sources, repeated up to a number of bytes."""
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in found if "site-packages" not in path.parts]
    texts = [text for text in texts if text]
    out: list[str] = []
    total = 0.0
    while total < num_bytes:
        text = texts[len(out) % len(texts)]
        out.append(text)
        total += len(text.encode())
    return out


def tokenizer_config(vocab_file: str, merge_file: str, texts: Sequence[str], folder: Path) -> TokenizerConfig:
    """Return the given vocabulary, or one trained on the first 5 MB."""
    if not vocab_file:
        train_byte_level_bpe(texts[:300], folder, vocab_size=8192)
        vocab_file, merge_file = str(folder / "vocab.json"), str(folder / "merges.txt")
    return TokenizerConfig(vocab_file=vocab_file, merge_file=merge_file)


class Side(NamedTuple):
    """One measured variant, with the amount of text that it reads."""

    run: Callable[[], object]
    megabytes: float


def compare_rates(texts: list[str], few: list[str], config: TokenizerConfig, folder: Path, repeats: int) -> None:
    """Measure the variants in turns and print rates and ratios; slow variants read the `few` texts."""
    all_of_it, part = write_corpus(texts, folder / "corpus.jsonl"), write_corpus(few, folder / "part.jsonl")
    half_of_it = write_corpus(texts[: len(texts) // 2], folder / "half.jsonl")
    third = few[: len(few) // 3]
    third_of_it = write_corpus(third, folder / "third.jsonl")
    giga, tik, plain = (
        read_gpt2(config.vocab_file, config.merge_file, encoders=encoders)
        for encoders in (("gigatoken",), ("tiktoken",), ())
    )
    gigatoken, tiktoken = giga.fast, tik.fast
    if gigatoken is None or tiktoken is None:
        raise SystemExit("gigatoken or tiktoken is not installed, or this vocabulary is not for it")
    slow = replace(config, fast=False)
    much, little = megabytes_of(texts), megabytes_of(few)
    sides = {
        "gigatoken, 1 thread": Side(
            lambda: in_batches(lambda batch: list(map(gigatoken._library.encode, batch)), texts), much
        ),
        "tiktoken, batch, 1 thread": Side(
            lambda: in_batches(lambda batch: tiktoken._library.encode_ordinary_batch(batch, num_threads=1), few), little
        ),
        "preprocess, 1 worker": Side(lambda: ours(all_of_it, config, folder, 1), much),
        "preprocess, 2 workers": Side(lambda: ours(all_of_it, config, folder, 2), much),
        "preprocess, 2 runs at once": Side(lambda: at_once(half_of_it, config, folder), much),
        "tokenizers, batch, 1 thread": Side(lambda: in_batches(plain._library.encode_batch_fast, few), little),
        "preprocess, 1 worker, tokenizers": Side(lambda: ours(part, slow, folder, 1), little),
        "originals' design, 1 worker": Side(lambda: original(third_of_it, slow, folder), megabytes_of(third)),
    }
    wall, cpu = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    for _ in range(repeats):
        for name, side in sides.items():
            began, worked = time.perf_counter(), sum(os.times()[:4])
            side.run()
            wall[name] = max(wall[name], side.megabytes / (time.perf_counter() - began))
            cpu[name] = max(cpu[name], side.megabytes / (sum(os.times()[:4]) - worked))
            for path in folder.glob("**/out_*"):
                path.unlink()
    print(f"{much:.0f} MB of text, {len(texts)} documents, vocabulary {plain.vocab_size}")
    print(f"  {'':34s}    MB   MB/s   MB per CPU second")
    for name, side in sides.items():
        print(f"  {name:34s} {side.megabytes:5.0f} {wall[name]:6.2f} {cpu[name]:6.2f}")
    one = cpu["preprocess, 1 worker"]
    print(f"  {'1 worker, MB per CPU second':34s} {one:6.1f}  (at least 100: {'yes' if one >= 100 else 'NO'})")
    print(f"  {'1 worker / gigatoken alone':34s} {one / cpu['gigatoken, 1 thread']:6.2f}")
    ceiling = wall["preprocess, 2 runs at once"] / wall["preprocess, 1 worker"]
    print(f"  {'2 runs at once / 1 worker (wall)':34s} {ceiling:6.2f}")
    for title, ours_is, other, rates, goal in (
        ("1 worker / tiktoken alone", "preprocess, 1 worker", "tiktoken, batch, 1 thread", cpu, 0.9),
        ("the same with tokenizers", "preprocess, 1 worker, tokenizers", "tokenizers, batch, 1 thread", cpu, 0.9),
        ("1 worker / originals' design", "preprocess, 1 worker", "originals' design, 1 worker", cpu, 3.0),
        ("2 workers / 1 worker (wall)", "preprocess, 2 workers", "preprocess, 1 worker", wall, 1.9),
    ):
        ratio = rates[ours_is] / rates[other]
        print(f"  {title:34s} {ratio:6.2f}  (at least {goal}: {'yes' if ratio >= goal else 'NO'})")


def megabytes_of(texts: Sequence[str]) -> float:
    """Return the megabytes of texts in UTF-8."""
    return sum(len(text.encode()) for text in texts) / 1e6


def write_corpus(texts: Sequence[str], path: Path) -> Path:
    """Write texts as the lines of a .jsonl file."""
    line_of = functools.cache(lambda text: json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(line_of, texts))
    return path


def in_batches(encode: Callable[[list[str]], object], texts: list[str]) -> None:
    """Call the library batch by batch and drop each result, which would otherwise fill gigabytes."""
    for start in range(0, len(texts), 500):
        encode(texts[start : start + 500])


def ours(corpus: Path, config: TokenizerConfig, folder: Path, workers: int) -> None:
    """Preprocess once."""
    preprocess(
        PreprocessOptions(
            inputs=(str(corpus),),
            output_prefix=str(folder / "out"),
            overwrite=True,
            tokenizer=config,
            append_eod=True,
            workers=workers,
        ),
        ProgressDisplay(),
    )


def at_once(corpus: Path, config: TokenizerConfig, folder: Path) -> None:
    """Preprocess twice at once, in two processes that share nothing: the most to expect of two workers."""
    processes = []
    for name in ("first", "second"):
        (folder / name).mkdir(exist_ok=True)
        arguments = (corpus, config, folder / name, 1)
        processes.append(multiprocessing.get_context("fork").Process(target=ours, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A run of preprocess failed")


class Encoder:
    """Worker of Megatron's tools: a tokenizer per process, a document per call."""

    tokenizer: Tokenizer

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config

    def initializer(self) -> None:
        """Build the tokenizer in the process."""
        Encoder.tokenizer = build_tokenizer(self.config)

    def encode(self, line: str) -> tuple[list[int], int]:
        """Return the ids and bytes of one document."""
        ids = Encoder.tokenizer.encode(json.loads(line)["text"])
        if ids:
            ids.append(Encoder.tokenizer.eod)
        return ids, len(line)


def original(corpus: Path, config: TokenizerConfig, folder: Path) -> None:
    """Encode single documents in a pool of one worker and write them in the parent, as Megatron's tools do."""
    encoder = Encoder(config)
    with (
        corpus.open(encoding="utf-8") as lines,
        multiprocessing.get_context("fork").Pool(1, initializer=encoder.initializer) as pool,
        IndexedDatasetWriter(folder / "original", np.uint16) as writer,
    ):
        for ids, _ in pool.imap(encoder.encode, lines, 25):
            if ids:
                writer.add_sequence(np.array(ids, np.uint16))
                writer.end_document()


MEASURE = """
import resource, sys
from megatron_lite.cli.main import main
main(sys.argv[1:])
mb = lambda who: resource.getrusage(who).ru_maxrss / 1024
print("peak", mb(resource.RUSAGE_SELF), mb(resource.RUSAGE_CHILDREN))
"""


def compare_memory(texts: Sequence[str], config: TokenizerConfig, folder: Path, megabytes: Sequence[float]) -> None:
    """Print the peak memory of the parent and of the largest worker for two sizes of input."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    peaks = []
    for size in (1e6 * megabytes[0], 1e6 * megabytes[1]):
        corpus = folder / "memory.jsonl"
        with corpus.open("wb") as file:
            while file.tell() < size:
                file.write(lines)
        words = ["preprocess", "--input", str(corpus), "--output-prefix", str(folder / "memory"), "--overwrite"]
        words += ["--vocab-file", config.vocab_file, "--merge-file", config.merge_file, "--workers", "2"]
        done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
        parent, worker = (float(word) for word in done.stdout.split()[-2:])
        peaks.append(parent + worker)
        print(f"  {size / 1e6:5.0f} MB of input: parent {parent:.0f} MB, largest worker {worker:.0f} MB", flush=True)
    print(f"  ratio {peaks[1] / peaks[0]:.3f}  (at most 1.1: {'yes' if peaks[1] <= 1.1 * peaks[0] else 'NO'})")


if __name__ == "__main__":
    main()
