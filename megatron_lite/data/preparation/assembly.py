"""Assembly of the final datasets: units appended in order, written in place or copied from shards; resumable."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np

from megatron_lite.data.format.indexed_writer import Extent, IndexedDatasetWriter
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.data.preparation.work_folder import FinishedUnit, Shard, WorkFolder
from megatron_lite.data.preparation.worker import Step, UnitWorker

COMMIT_BYTES = 64 << 20
"""Bytes of tokens after which the appended units are recorded as finished."""


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
        self.writers: list[IndexedDatasetWriter] = []
        try:
            for key, (prefix, dtype) in enumerate(zip(prefixes, dtypes, strict=True)):
                extent = Extent(*self.done[-1].shards[key].end) if self.done else None
                self.writers.append(IndexedDatasetWriter(prefix, dtype, folder.assembled(key), extent))
        except BaseException:
            self._close()
            raise

    def _next(self) -> int | None:
        """Return the number of the next unit; None if all are appended."""
        return self._numbers[len(self.done)] if len(self.done) < len(self._numbers) else None

    def append_finished(self) -> bool:
        """Append the next unit if it is finished, and return whether it is."""
        number = self._next()
        unit = None if number is None else self._folder.read(number)
        if unit is None:
            return False
        for writer, shard in zip(self.writers, unit.shards, strict=True):
            writer.append(shard.name)
        self._add(unit)
        return True

    def write(self, worker: UnitWorker, unit: Unit) -> Generator[Step, None, None]:
        """Tokenize the next unit into the datasets, and yield the steps of progress."""
        before = [writer.num_bytes for writer in self.writers]
        checksums, report = yield from worker.run(unit, self.writers)
        shards = [
            Shard("", writer.num_bytes - start, checksum)
            for writer, start, checksum in zip(self.writers, before, checksums, strict=True)
        ]
        self._add(FinishedUnit(shards, report))

    def _add(self, unit: FinishedUnit) -> None:
        ends = [replace(shard, end=writer.extent) for shard, writer in zip(unit.shards, self.writers, strict=True)]
        self.done.append(replace(unit, shards=ends))
        if sum(shard.num_bytes for one in self.done[self._committed :] for shard in one.shards) >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Record the units appended since the last call as finished, after their tokens are on the disk."""
        new = self.done[self._committed :]
        if not new:
            return
        for writer in self.writers:
            writer.sync()
        joined = [replace(one, shards=[replace(shard, name="") for shard in one.shards]) for one in new]
        first = self._committed
        self._folder.mark_assembled(dict(zip(self._numbers[first:], joined, strict=False)))
        self._folder.drop([shard for one in new for shard in one.shards if shard.name])
        self.done[first:] = joined
        self._committed = len(self.done)

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
        for writer in self.writers:
            writer.abort()
