"""Micro-batch loader of one data-parallel replica, with a prefetch thread.

There is no position to save or restore: asking for (consumed, index) gives the same tokens in any order and any
process. The thread only guesses that the next micro-batch of the same schedule is wanted next.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.order.cyclic import CyclicOrder
from megatron_lite.data.serving.dataset import Dataset
from megatron_lite.schedules.microbatches import microbatch_start, num_microbatches
from megatron_lite.schedules.skipping import Ranges, place_of

LOOK_AHEAD = 1000
"""Iterations in which the next micro-batch is looked for: a replica may have none while the batch ramps up."""


class Loader:
    """Reads micro-batches of a dataset.

    Args:
        dataset: what is read.
        micro_batch: samples of a micro-batch.
        global_batch: samples of the iteration that begins at a number of consumed samples (schedules/batch_size.py
            for training, a constant for validation).
        dp: data-parallel replicas.
        replica: which of them this process belongs to.
        prefetch: micro-batches read ahead; 0: everything is read when it is asked for.
        cyclic_layout: (micro-batch size, replicas) that Megatron's cyclic sampler shuffles for; None: the dataset's own
            order. It is the layout that the run began with, which need not be this one.
        repeats: whether the dataset begins anew at its end, as validation's may; False: its end is an error.

    Attributes:
        names: names of the dataset's sources.
        skipped: ranges of positions in the data order that are left out (schedules/skipping.py); none at first.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch: int,
        global_batch: Callable[[int], int],
        dp: int = 1,
        replica: int = 0,
        prefetch: int = 2,
        cyclic_layout: tuple[int, int] | None = None,
        repeats: bool = False,
    ) -> None:
        self.dataset = dataset
        self.names = tuple(dataset.sources)
        self.micro_batch = micro_batch
        self.global_batch = global_batch
        self.dp = dp
        self.replica = replica
        self.prefetch = prefetch
        self.skipped: Ranges = ()
        self.repeats = repeats
        self._order = CyclicOrder(len(dataset), *cyclic_layout) if cyclic_layout is not None else None
        self._ahead: OrderedDict[tuple[int, int], Future[NDArray[np.int64]]] = OrderedDict()
        # Datasets remember what they worked out last, so only one thread at a time reads them.
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data") if prefetch else None

    def positions(self, start: int, count: int) -> list[int]:
        """Return the positions in the data order of the samples consumed after `start` others, [count]."""
        total = len(self.dataset) if self._order is None else None
        if self.repeats and total is not None:
            return [consumed % total for consumed in range(start, start + count)]
        return [place_of(consumed, self.skipped, total) for consumed in range(start, start + count)]

    def samples(self, start: int, count: int) -> list[int]:
        """Numbers in the dataset of the samples that are consumed after `start` others, [count]."""
        with self._lock:
            return self._samples(start, count)

    def list_samples(self, start: int, count: int, shown: int = 8) -> str:
        """Return the numbers of these samples as text for a message, the first `shown` of them."""
        samples = self.samples(start, count)
        return ", ".join(map(str, samples[:shown])) + (", …" if count > shown else "")

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens of the samples consumed after `start` others, [count, L + 1].

        Raises:
            DataError: the dataset ends before, or is damaged there.
        """
        with self._lock:
            return np.stack([self.dataset[sample] for sample in self._samples(start, count)])

    def sources(self, start: int, count: int) -> NDArray[np.int64]:
        """Number of the source of each of these samples, [count], for the loss by source."""
        with self._lock:
            return np.array([self.dataset.source(sample) for sample in self._samples(start, count)], dtype=np.int64)

    def start(self, consumed: int, index: int) -> int:
        """Samples consumed before the `index`-th micro-batch of this replica begins."""
        return microbatch_start(consumed, self.micro_batch, self.dp, self.replica, index)

    def microbatch(self, consumed: int, index: int, length: int | None = None) -> NDArray[np.int64]:
        """Tokens of this replica's `index`-th micro-batch in the iteration that begins at `consumed`.

        Args:
            consumed: samples consumed before the iteration.
            index: 0 .. num_microbatches - 1 of this replica.
            length: tokens of an input where the curriculum cuts samples short; None: L.

        Returns:
            [micro_batch, length + 1]

        Raises:
            DataError: the dataset ends before, or is damaged there, whether this thread met it or the other one.
        """
        wanted = (consumed, index)
        if self._thread is None:
            tokens = self._read(wanted)
        else:
            if wanted not in self._ahead:
                self._drop()
            future = self._take(wanted) or self._thread.submit(self._read, wanted)
            self._read_ahead(self._thread, wanted)
            tokens = future.result()
        return tokens if length is None else tokens[:, : length + 1]

    def close(self) -> None:
        """Stop reading ahead; reading on demand stays possible."""
        self._drop()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _samples(self, start: int, count: int) -> list[int]:
        positions = self.positions(start, count)
        return positions if self._order is None else [self._order[position] for position in positions]

    def _read(self, wanted: tuple[int, int]) -> NDArray[np.int64]:
        return self.read(self.start(*wanted), self.micro_batch)

    def _read_ahead(self, thread: ThreadPoolExecutor, current: tuple[int, int]) -> None:
        """Keep the `prefetch` micro-batches after `current` on their way, and drop what is not among them."""
        following: tuple[int, int] | None = current
        kept: OrderedDict[tuple[int, int], Future[NDArray[np.int64]]] = OrderedDict()
        for _ in range(self.prefetch):
            following = self._after(*following) if following is not None else None
            if following is not None:
                kept[following] = self._take(following) or thread.submit(self._read, following)
        self._drop()
        self._ahead = kept

    def _take(self, wanted: tuple[int, int]) -> Future[NDArray[np.int64]] | None:
        return self._ahead.pop(wanted) if wanted in self._ahead else None

    def _after(self, consumed: int, index: int) -> tuple[int, int] | None:
        """The micro-batch of this replica that follows, in this iteration or the next that has one for it."""
        index += 1
        for _ in range(LOOK_AHEAD):
            batch = self.global_batch(consumed)
            if index < num_microbatches(batch, self.micro_batch, self.dp, self.replica):
                return consumed, index
            consumed, index = consumed + batch, 0
        return None

    def _drop(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
