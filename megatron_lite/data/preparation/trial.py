"""Worker-count benchmark (--find-optimal-num-workers) on the beginning of the input."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_lite.data.preparation.lines import read_lines
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.progress import SilentProgress
from megatron_lite.data.preparation.run import preprocess
from megatron_lite.data.preparation.sources import find_sources, plan_units

LOOKED_AT = 1000


def compare_worker_counts(
    options: PreprocessOptions, counts: Sequence[int], max_documents: int, say: Callable[[str], None]
) -> dict[int, float]:
    """Preprocess about `max_documents` documents with each number of workers; returns seconds of each."""
    limit = _bytes_of(options, max_documents)
    seconds: dict[int, float] = {}
    for workers in counts:
        with tempfile.TemporaryDirectory() as folder:
            # Enough units for the largest number of workers, and the same ones for all.
            unit_bytes = max(1 << 16, limit // (4 * max(counts)))
            prefix = str(Path(folder) / "trial")
            began = time.monotonic()
            trial = replace(
                options, output_prefix=prefix, workers=workers, limit_bytes=limit, unit_bytes=unit_bytes, shuffle=False
            )
            preprocess(trial, SilentProgress())
            seconds[workers] = time.monotonic() - began
        say(f"  {workers:4d} workers: {limit / seconds[workers] / 1e6:8.2f} MB/s ({seconds[workers]:.1f} s)")
    say(f"Fastest here: --workers {min(seconds, key=lambda count: seconds[count])}")
    return seconds


def _bytes_of(options: PreprocessOptions, documents: int) -> int:
    """About how many bytes of input that many documents take, judged by the first ones."""
    sources = find_sources(options.inputs)
    total = sum(source.num_bytes for source in sources)
    for unit in plan_units(sources, unit_bytes=1 << 62):
        lines = list(islice(read_lines(unit, options.json_keys), LOOKED_AT))
        if lines:
            return max(1, min(total, lines[-1].position * documents // len(lines)))
    return max(1, total)
