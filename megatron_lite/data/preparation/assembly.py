"""Dataset writer of preprocessing: tokens in input order, written directly or merged from the workers' shards."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np

from megatron_lite.data.format.indexed_writer import Extent, IndexedDatasetWriter
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.data.preparation.work_folder import FinishedUnit, Shard, WorkFolder
from megatron_lite.data.preparation.worker import Step, UnitWorker

COMMIT_BYTES = 64 << 20
"""Bytes of tokens after which the appended units are recorded as finished, in a thread that waits for the disk."""


class Assembly:
    """Datasets in the work folder that grow unit by unit and get their final names at the end.

    A unit that this process tokenizes is written here directly. The shards of units that workers tokenized are copied,
    and deleted once the copy is on the disk. As a context manager, it keeps the appended units if the block raises.

    Args:
        folder: the work folder.
        numbers: numbers of the units (or buckets of the shuffle) in the order of the output.
        prefixes: final paths of the datasets.
        dtypes: type of the tokens of each.

    Attributes:
        done: [appended units] shards and reports.
        writers: writers of the datasets.

    Raises:
        DataError: the files of an interrupted run were shortened, or cannot be written.
    """

    def __init__(
        self, folder: WorkFolder, numbers: Sequence[int], prefixes: Sequence[str], dtypes: Sequence[np.dtype]
    ) -> None:
        self._folder = folder
        self._numbers = numbers
        finished = folder.finished()
        self.done = list(
            itertools.takewhile(lambda unit: unit.is_assembled, (finished[n] for n in numbers if n in finished))
        )
        self._committed = len(self.done)
        self._thread = ThreadPoolExecutor(1)
        self._record = self._thread.submit(lambda: None)
        self.writers: list[IndexedDatasetWriter] = []
        try:
            for key, (prefix, dtype) in enumerate(zip(prefixes, dtypes, strict=True)):
                extent = Extent(*self.done[-1].shards[key].end) if self.done else None
                self.writers.append(IndexedDatasetWriter(prefix, dtype, folder.assembled(key), extent))
        except BaseException:
            self._close()
            raise

    def append_finished(self) -> int:
        """Append the next units if a worker has finished them, and return how many there are."""
        left = self._numbers[len(self.done) :]
        units = self._folder.read(left[0]) if left else {}
        if not units:
            return 0
        starts = [writer.extent for writer in self.writers]
        for writer, shard in zip(self.writers, units[left[0]].shards, strict=True):
            writer.append(shard.name)
        for unit in units.values():
            ends = [Extent(*map(sum, zip(a, s.end, strict=True))) for a, s in zip(starts, unit.shards, strict=True)]
            shards = [replace(shard, end=end) for shard, end in zip(unit.shards, ends, strict=True)]
            self.done.append(replace(unit, shards=shards))
        self._commit_if_due()
        return len(units)

    def write(self, worker: UnitWorker, unit: Unit) -> Generator[Step, None, None]:
        """Tokenize the next unit into the datasets, and yield the steps of progress."""
        self.done.append((yield from worker.run(unit, self.writers)))
        self._commit_if_due()

    def _commit_if_due(self) -> None:
        size = sum(shard.num_bytes for one in self.done[self._committed :] for shard in one.shards)
        if size >= COMMIT_BYTES and self._record.done():
            self._commit()

    def commit(self) -> None:
        """Record all appended units as finished, after their tokens are on the disk."""
        self._commit()
        self._record.result()

    def _commit(self) -> None:
        self._record.result()
        first, new = self._committed, self.done[self._committed :]
        if not new:
            return
        for writer in self.writers:
            writer.flush()
        self.done[first:] = [replace(one, shards=[replace(shard, name="") for shard in one.shards]) for one in new]
        self._committed = len(self.done)
        units = dict(zip(self._numbers[first:], self.done[first:], strict=False))
        self._record = self._thread.submit(self._sync, units, [shard for one in new for shard in one.shards])

    def _sync(self, units: dict[int, FinishedUnit], copied: Sequence[Shard]) -> None:
        for writer in self.writers:
            writer.sync()
        self._folder.mark_assembled(units)
        self._folder.drop([shard for shard in copied if shard.name])

    def __enter__(self) -> Assembly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.commit()
        finally:
            self._close()

    def _close(self) -> None:
        self._thread.shutdown()
        for writer in self.writers:
            writer.abort()
