"""Warm start at toy size: three GPTs, each grown from the one before by duplicating its layers.

    python examples/warm_start/grow.py [--output FOLDER] [--iterations N]

The original grew 580M -> 760M -> 1.1B parameters: 18, 24 and 36 layers of width 1536 with 12 heads, ALiBi and a
vocabulary of 50,304 (`--preset gpt-580m`, `gpt-760m`, `gpt-1.1b`). It was trained in bf16 with a context warm-up, its
weights were averaged, and it was evaluated with lm-eval. Here the models have 3, 4 and 6 layers of width 48, the same
ratio of depths, and are trained on the sources of Python's standard library, offline, in less than half a minute of CPU
time. Each command is printed before it runs, as if typed. docs/warm_start.md describes `megatron-lite upscale`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_lite.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"580m": 3, "760m": 4, "1.1b": 6}
"""Layers by name of the original."""


def run(*args: object) -> None:
    """Print a command and run it in this process; exit if it fails."""
    words = [str(arg) for arg in args]
    print(f"\n$ megatron-lite {shlex.join(words)}", flush=True)
    if code := main(words):
        sys.exit(code)


def prepare(folder: Path, megabytes: float) -> list[object]:
    """Write corpus, tokenizer and dataset; return the flags of a training run that reads them."""
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
    script = [sys.executable, str(ROOT / "examples" / "python_corpus.py"), str(corpus), "--max-mb", str(megabytes)]
    subprocess.run(script, check=True)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
    run("train-tokenizer", "--input", corpus, "--output", tokenizer, "--vocab-size", 512)
    run("preprocess", "--input", corpus, "--output-prefix", folder / "python", *flags, "--append-eod")
    return [*flags, "--data-path", folder / "python_text_document", "--split", "100,0,0", "--eval-iters", 0]


def grow(folder: Path, iterations: int, megabytes: float) -> None:
    """Train each model, average its last two checkpoints, evaluate, and grow the next one from the average."""
    data = prepare(folder, megabytes)
    # Context warm-up: sequences of 16 tokens at first, 64 after half of the iterations.
    model = ["--hidden-size", 48, "--num-attention-heads", 2, "--position-embedding-type", "alibi", "--seq-length", 64]
    model += ["--seq-length-warmup", f"16:{max(1, iterations // 2)}:16", "--bf16"]
    training = ["--micro-batch-size", 8, "--train-iters", iterations, "--lr", 3e-3, "--lr-warmup-iters", 2]
    training += ["--log-interval", max(1, iterations // 4), "--hidden-dropout", 0, "--attention-dropout", 0]
    training += ["--num-threads", 1]
    half = iterations - iterations // 2
    start: list[object] = []
    for name, layers in LAYERS.items():
        runs, mean = folder / name, folder / f"{name}-mean"
        save = ["--save", runs, "--save-interval", half]
        run("train", "--num-layers", layers, *model, *training, *data, *start, *save)
        last = [runs / f"iter_{iteration:07d}" for iteration in (half, iterations)]
        run("checkpoint", "average", *last, "--output", mean)
        run("evaluate", "--load", mean, "--text", ROOT / "README.md")
        deeper = [count for count in LAYERS.values() if count > layers]
        if deeper:
            grown = folder / f"{name}-grown"
            run("upscale", mean, "--layers", deeper[0], "--output", grown)
            start = ["--load", grown, "--finetune"]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/warm_start"), help="a new folder")
    parser.add_argument("--iterations", type=int, default=40, help="of each model, at least 2")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of text")
    options = parser.parse_args()
    if options.iterations < 2:
        parser.error("--iterations must be at least 2: two checkpoints are averaged")
    if options.output.exists():
        parser.error(f"{options.output} exists already: give another --output, or delete it first")
    return options


if __name__ == "__main__":
    given = parse()
    grow(given.output, given.iterations, given.megabytes)
