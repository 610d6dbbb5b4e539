"""Cyclic sampler (--dataloader-type cyclic): Megatron's sampler that reshuffles the samples every epoch.

An epoch is divided into one bucket per data-parallel replica, and each replica shuffles its own bucket. This order is
the only one that depends on the parallel layout, as in Megatron. A run keeps the order of the layout that it started
with; any other layout can read it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import DataError
from megatron_lite.formatting import format_count

EPOCHS_KEPT = 2
"""Permutations kept in memory: near the end of an epoch, samples of two epochs are read."""

CHUNK = 1 << 20
"""Random numbers drawn at a time."""


class CyclicOrder:
    """Map from the number of consumed samples to the next sample of the dataset.

    Args:
        size: samples of the dataset.
        micro_batch: micro-batch size of the layout that the order belongs to.
        dp: data-parallel replicas of that layout.

    Raises:
        DataError: the dataset has less than one micro-batch per replica.
    """

    def __init__(self, size: int, micro_batch: int, dp: int) -> None:
        self.micro_batch = micro_batch
        self.dp = dp
        self.bucket = size // (micro_batch * dp) * micro_batch
        if not self.bucket:
            raise DataError(
                f"The training set is too small for --dataloader-type cyclic: it has {format_count(size, 'sample')}, "
                f"and one micro-batch of {micro_batch} for each of {format_count(dp, 'replica')} needs "
                f"{micro_batch * dp}",
                fix="Use --dataloader-type single, a larger --data-path"
                + (f", or --micro-batch-size {size // dp} or less" if size >= dp else " or fewer ranks"),
            )
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __getitem__(self, consumed: int) -> int:
        """Return the number in the dataset of the sample that is consumed after `consumed` others."""
        epoch, position = divmod(consumed, self.bucket * self.dp)
        micro_batch, within = divmod(position, self.micro_batch)
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
    """Return torch.randperm(size) of a CPU generator seeded with `seed`, int64 [size], without torch.

    Both libraries use the same Mersenne Twister with the same seeding; torch swaps each element with itself or a later
    one, whose index is a draw modulo the remaining count. The Python loop takes about half a second per million.
    Draws are made in chunks and the order is an array of machine integers, which keeps memory at 8 bytes a sample.
    """
    rng, order = np.random.RandomState(seed), array("q", range(size))
    for low in range(0, size - 1, CHUNK):
        count = min(CHUNK, size - 1 - low)
        draws = rng.randint(0, 2**32, count, dtype=np.uint32).astype(np.int64)
        picks = low + np.arange(count) + draws % np.arange(size - low, size - low - count, -1)
        for index, pick in enumerate(picks.tolist(), low):
            order[index], order[pick] = order[pick], order[index]
    return np.array(order, dtype=np.int64)
