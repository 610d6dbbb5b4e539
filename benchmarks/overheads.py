"""Benchmark of fixed overheads: import of the command line against torch, an unmeasured timer against an empty block.

    python benchmarks/overheads.py

Prints the medians of both sides and their ratio.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import timeit
from contextlib import nullcontext

from megatron_lite.config.arguments import parse_run
from megatron_lite.metrics.timers import Timers

SIZES = {"num-layers": 4, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 32, "micro-batch-size": 2}
WORDS = [
    word for name, value in (SIZES | {"train-iters": 100, "lr": 1e-3}).items() for word in (f"--{name}", str(value))
]
REPEATS = 5


def main() -> None:
    """Measure and print."""
    ours, torch = import_seconds("megatron_lite.config.arguments"), import_seconds("torch")
    print(f"import of the command line {ours:.3f} s, of torch {torch:.3f} s: ratio {ours / torch:.2f}")
    parse_run(WORDS)
    print(f"parsing a command line {per_call(lambda: parse_run(WORDS), 100) * 1e3:.2f} ms")
    timers, empty = Timers(0, lambda: None), nullcontext()

    def timed() -> None:
        with timers("forward"):
            pass

    def untimed() -> None:
        with empty:
            pass

    off, plain = per_call(timed, 100_000), per_call(untimed, 100_000)
    print(f"a switched-off timer {off * 1e9:.0f} ns, an empty block {plain * 1e9:.0f} ns: ratio {off / plain:.2f}")


def import_seconds(module: str) -> float:
    """Return the seconds of an import in a new interpreter."""
    code = f"import time; begun = time.perf_counter(); import {module}; print(time.perf_counter() - begun)"
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(REPEATS)]
    return statistics.median(map(float, runs))


def per_call(function: object, number: int) -> float:
    """Return the seconds of one call."""
    return statistics.median(timeit.repeat(function, number=number, repeat=REPEATS)) / number  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
