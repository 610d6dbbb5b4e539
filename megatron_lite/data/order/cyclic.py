"""Cyclic sampler (--dataloader-type cyclic): Megatron's sampler that reshuffles the samples every epoch.

An epoch is cut into one bucket per data-parallel replica, and each replica walks its bucket in an order of its own.
Unlike everything else here the order therefore depends on the layout, as it does in Megatron. A run keeps the order of
the layout that it began with, which any other layout can read.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import DataError

EPOCHS_KEPT = 2
"""Permutations kept in memory: around the end of an epoch, samples of two of them are read."""

CHUNK = 1 << 20
"""Draws made at a time."""


class CyclicOrder:
    """Which sample of the dataset is the n-th that a run consumes.

    Args:
        size: samples of the dataset.
        micro_batch: samples of a micro-batch of the layout that the order is made for.
        dp: data-parallel replicas of that layout.

    Raises:
        DataError: the dataset has less than one micro-batch for each replica.
    """

    def __init__(self, size: int, micro_batch: int, dp: int) -> None:
        self.micro_batch = micro_batch
        self.dp = dp
        self.bucket = size // (micro_batch * dp) * micro_batch
        if not self.bucket:
            raise DataError(
                "The cyclic sampler needs a micro-batch for each replica in every epoch",
                found=f"{size} samples, micro-batches of {micro_batch}, {dp} replicas",
                fix="Use --dataloader-type single, more text, or a smaller --micro-batch-size",
            )
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __getitem__(self, consumed: int) -> int:
        """Number in the dataset of the sample that is consumed after `consumed` others."""
        epoch, place = divmod(consumed, self.bucket * self.dp)
        micro_batch, within = divmod(place, self.micro_batch)
        step, replica = divmod(micro_batch, self.dp)
        return replica * self.bucket + int(self._order(epoch)[step * self.micro_batch + within])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders[epoch] = torch_permutation(self.bucket, epoch)
            if len(self._orders) > EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]


def torch_permutation(size: int, seed: int) -> NDArray[np.int64]:
    """Return what torch.randperm(size) gives on a CPU generator seeded with `seed`, int64 [size], without torch.

    Both libraries draw from the same Mersenne Twister with the same seeding; torch swaps each place with one not
    before it, drawn as a remainder. A loop in Python: about half a second for a million. Draws are made CHUNK by CHUNK
    and the order is an array of machine integers, so that memory stays at 8 bytes a sample.
    """
    rng, order = np.random.RandomState(seed), array("q", range(size))
    for low in range(0, size - 1, CHUNK):
        count = min(CHUNK, size - 1 - low)
        draws = rng.randint(0, 2**32, count, dtype=np.uint32).astype(np.int64)
        picks = low + np.arange(count) + draws % np.arange(size - low, size - low - count, -1)
        for place, pick in enumerate(picks.tolist(), low):
            order[place], order[pick] = order[pick], order[place]
    return np.array(order, dtype=np.int64)
