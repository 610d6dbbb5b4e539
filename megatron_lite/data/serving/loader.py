"""Micro-batch loader of one data-parallel replica: tokens for a count of consumed samples and a micro-batch index.

The loader has no state to save or restore: the same place gives the same tokens in any order and in any process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.order.cyclic import CyclicOrder
from megatron_lite.data.serving.dataset import Dataset
from megatron_lite.schedules.microbatches import microbatch_start, num_microbatches
from megatron_lite.schedules.skipping import Ranges, place_of

LOOK_AHEAD = 1000
"""Iterations searched for the next micro-batch: a replica may have none while the batch size ramps up."""


class Loader:
    """Micro-batches of a dataset for one data-parallel replica.

    Args:
        dataset: the dataset.
        micro_batch: samples of a micro-batch.
        global_batch: global batch size as a function of consumed samples (schedules/batch_size.py for training, a
            constant for validation).
        dp: data-parallel replicas.
        replica: data-parallel rank of this process.
        cyclic_layout: (micro-batch size, replicas) of Megatron's cyclic sampler, from the layout that the run began
            with; None: the order of the dataset.
        repeats: restart the dataset at its end (validation); False: reading past the end is an error.

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
        cyclic_layout: tuple[int, int] | None = None,
        repeats: bool = False,
    ) -> None:
        self.dataset = dataset
        self.names = tuple(dataset.sources)
        self.micro_batch = micro_batch
        self.global_batch = global_batch
        self.dp = dp
        self.replica = replica
        self.skipped: Ranges = ()
        self.repeats = repeats
        self._order = CyclicOrder(len(dataset), *cyclic_layout) if cyclic_layout is not None else None
        # Datasets cache their last computations without locking, so one thread at a time reads them.
        self._lock = threading.Lock()

    def positions(self, start: int, count: int) -> list[int]:
        """Return the positions in the data order of the samples consumed after `start` others, [count]."""
        total = len(self.dataset) if self._order is None else None
        if self.repeats and total is not None:
            return [consumed % total for consumed in range(start, start + count)]
        return [place_of(consumed, self.skipped, total) for consumed in range(start, start + count)]

    def samples(self, start: int, count: int) -> list[int]:
        """Return the numbers in the dataset of the samples consumed after `start` others, [count]."""
        with self._lock:
            return self._samples(start, count)

    def list_samples(self, start: int, count: int, shown: int = 8) -> str:
        """Return the numbers of these samples as text for a message, the first `shown` of them."""
        samples = self.samples(start, count)
        return ", ".join(map(str, samples[:shown])) + (", …" if count > shown else "")

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the tokens of the samples consumed after `start` others, [count, L + 1].

        With loss masks (answers.py) [count, 2, L + 1].

        Raises:
            DataError: the dataset is too short, or damaged at these samples.
        """
        with self._lock:
            return np.stack([self.dataset[sample] for sample in self._samples(start, count)])

    def sources(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the number of the source of each of these samples, [count], for the losses by source."""
        with self._lock:
            return np.array([self.dataset.source(sample) for sample in self._samples(start, count)], dtype=np.int64)

    def start(self, consumed: int, index: int) -> int:
        """Return the samples consumed before the `index`-th micro-batch of this replica."""
        return microbatch_start(consumed, self.micro_batch, self.dp, self.replica, index)

    def microbatch(self, consumed: int, index: int, length: int | None = None) -> NDArray[np.int64]:
        """Return the tokens of this replica's `index`-th micro-batch in the iteration that begins at `consumed`.

        Args:
            consumed: samples consumed before the iteration.
            index: 0 .. num_microbatches - 1 of this replica.
            length: input tokens of a sample under a sequence-length curriculum; None: L.

        Returns:
            [micro_batch, length + 1], or [micro_batch, 2, length + 1] with loss masks

        Raises:
            DataError: the dataset is too short, or damaged at these samples.
        """
        tokens = self.read(self.start(consumed, index), self.micro_batch)
        return tokens if length is None else tokens[..., : length + 1]

    def following(self, consumed: int, index: int) -> tuple[int, int] | None:
        """Return (consumed, index) of this replica's next micro-batch, in this iteration or a later one; None: far."""
        index += 1
        for _ in range(LOOK_AHEAD):
            batch = self.global_batch(consumed)
            if index < num_microbatches(batch, self.micro_batch, self.dp, self.replica):
                return consumed, index
            consumed, index = consumed + batch, 0
        return None

    def _samples(self, start: int, count: int) -> list[int]:
        positions = self.positions(start, count)
        return positions if self._order is None else [self._order[position] for position in positions]
