"""Slice sampling (--document-sampling slice): one random window of each document per epoch.

A long document gives seq_length + 1 tokens from a random offset; after a shorter one follow the beginnings of those
that come next in the epoch's order, so that no sample is padded. The order and the offsets are functions of
(seed, epoch) and (seed, epoch, document), and need neither an index nor a cache.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.serving.dataset import Span, SpanDataset, out_of_samples
from megatron_lite.errors import DataError

EPOCHS_KEPT = 2
"""Orders kept in memory: around the end of an epoch, samples of two of them are read."""


class SliceDataset(SpanDataset):
    """One slice of each document per epoch.

    Args:
        data: the .bin/.idx pair.
        bounds: sequences [first, last) of it.
        num_samples: samples that are asked for; None: one epoch.
        seq_length: L.
        seed: of the orders and offsets.
        vocab_size: ids must be below it; 0: not checked.

    Raises:
        DataError: the documents together are shorter than a sample.
    """

    def __init__(
        self,
        data: IndexedDataset,
        bounds: tuple[int, int],
        num_samples: int | None,
        seq_length: int,
        seed: int,
        vocab_size: int = 0,
    ) -> None:
        super().__init__(data, vocab_size)
        self.seq_length = seq_length
        self.seed = seed
        sizes = data.sizes[bounds[0] : bounds[1]]
        self._documents: NDArray[np.int64] = bounds[0] + np.flatnonzero(sizes > 0)
        tokens = int(np.sum(sizes, dtype=np.int64))
        if tokens <= seq_length:
            raise DataError(
                "A dataset has tokens for at least one sample",
                found=f"sequences {bounds[0]} to {bounds[1]} of {data.prefix} hold {tokens} tokens, a sample has "
                f"{seq_length} + 1",
                fix="Give more text, another --split, or a smaller --seq-length",
            )
        self.size = self._documents.shape[0] if num_samples is None else num_samples
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return self.size

    def find(self, sample: int) -> list[Span]:
        """The spans of a sample."""
        if not 0 <= sample < self.size:
            raise out_of_samples(sample, self.size, self.sources)
        epoch, place = divmod(sample, self._documents.shape[0])
        order = self._order(epoch)
        document = int(order[place])
        wanted = self.seq_length + 1
        spare = int(self.data.sizes[document]) - wanted
        offset = int(np.random.default_rng((self.seed, epoch, document)).integers(0, spare + 1)) if spare > 0 else 0
        spans = []
        while wanted:
            length = min(wanted, int(self.data.sizes[document]) - offset)
            spans.append((document, offset, length))
            wanted -= length
            place, offset = (place + 1) % order.shape[0], 0
            document = int(order[place])
        return spans

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Sequence numbers in the order in which `epoch` visits them."""
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self._documents)
            if len(self._orders) > EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]
