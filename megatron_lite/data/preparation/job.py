"""Preprocessing task of a worker process: writes the shards of one unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.report import Report
from megatron_lite.data.preparation.shard import Shard
from megatron_lite.data.preparation.shuffle import Bucket, sort_shard, write_bucket
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.data.preparation.work_folder import Done, mark_done, new_prefix
from megatron_lite.data.preparation.worker import Step, UnitWorker
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer

Task = Unit | Bucket
Job = Callable[[Task, Callable[[Step], None]], None]


def build_job(options: PreprocessOptions, folder: Path, tokenizer: Tokenizer | None = None) -> Job:
    """The function that works on one task after another; in a new process it builds its own tokenizer."""
    worker = UnitWorker(options, tokenizer or build_tokenizer(options.tokenizer))

    def job(task: Task, advance: Callable[[Step], None]) -> None:
        prefix = new_prefix(folder, task.number)
        try:
            if isinstance(task, Bucket):
                mark_done(folder, task.number, Done(write_bucket(task, prefix), Report()))
                advance(Step(0, 0, 0))
                return
            shards, report = worker.run(task, prefix, advance)
            if options.shuffle:
                shards = [_sorted(shard) for shard in shards]
            mark_done(folder, task.number, Done(shards, report))
        except OSError as error:
            raise DataError(
                "Shards can be written while preprocessing runs",
                found=f"{folder}: {error.strerror or error}",
                fix="Free space, then give the same command again: it continues",
            ) from error

    return job


def _sorted(shard: Shard) -> Shard:
    order = Path(f"{shard.name}.order")
    result = sort_shard(shard, np.fromfile(order, np.uint64))
    order.unlink()
    return result
