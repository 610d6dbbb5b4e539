"""A far sample of a blend against walking there: Megatron's rule, step by step, in plain Python.

    python benchmarks/data_blend.py [--sample 100000000] [--sources 5]

The plain walk is timed over its first steps and extrapolated; the counts at their end are compared.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from megatron_lite.data.blending import CHUNK, BlendIndex, normalize

STEPS = 500 * CHUNK


def main() -> None:
    """Time both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=100_000_000)
    parser.add_argument("--sources", type=int, default=5)
    options = parser.parse_args()
    weights = normalize(np.random.RandomState(0).uniform(0.05, 1, options.sources).tolist())
    began = time.process_time()
    source, number = walk(weights, STEPS)
    plain = (time.process_time() - began) * options.sample / STEPS
    assert BlendIndex(weights).lookup(STEPS - 1) == (source, number)
    began = time.process_time()
    BlendIndex(weights).lookup(options.sample)
    ours = time.process_time() - began
    print(f"sample {options.sample:,} of {options.sources} sources, seconds of processor")
    print(f"walked {plain:.1f} s, ours {ours:.4f} s: ratio {plain / ours:,.0f}")


def walk(weights: list[float], steps: int) -> tuple[int, int]:
    """Source of the last of `steps` samples, and its number in it."""
    counts, source = [0] * len(weights), 0
    for step in range(steps):
        passed = max(float(step), 1.0)
        errors = [weight * passed - count for weight, count in zip(weights, counts, strict=True)]
        source = errors.index(max(errors))
        counts[source] += 1
    return source, counts[source] - 1


if __name__ == "__main__":
    main()
