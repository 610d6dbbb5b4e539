"""Slice sampling (--document-sampling slice): one random window of each document per epoch.

A long document contributes seq_length + 1 tokens from a random offset. A shorter one is completed with the beginnings
of the documents that follow in the order of the epoch, so no sample is padded. Order and offsets are functions of
(seed, epoch) and (seed, epoch, document); neither an index nor a cache is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import count

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.sample_index import too_few_tokens
from megatron_lite.data.order.spans import Span, take_spans
from megatron_lite.data.serving.dataset import SpanDataset

EPOCHS_KEPT = 2
"""Permutations kept in memory: near the end of an epoch, samples of two epochs are read."""


class SliceDataset(SpanDataset):
    """Dataset with one slice of each document per epoch.

    Args:
        data: the .bin/.idx pair.
        bounds: first and last (exclusive) sequence.
        num_samples: number of samples; None: one epoch.
        seq_length: L.
        seed: seed of permutations and offsets.
        vocab_size: upper bound of token ids; 0: not checked.

    Raises:
        DataError: the documents hold fewer tokens than one sample.
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
            raise too_few_tokens(data.prefix, bounds, tokens, seq_length)
        self.size = self._documents.shape[0] if num_samples is None else num_samples
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return self.size

    def locate(self, sample: int) -> list[Span]:
        """Return the spans of a sample."""
        epoch, position = divmod(sample, self._documents.shape[0])
        order = self._order(epoch)
        document = int(order[position])
        wanted = self.seq_length + 1
        spare = int(self.data.sizes[document]) - wanted
        offset = int(np.random.default_rng((self.seed, epoch, document)).integers(0, spare + 1)) if spare > 0 else 0
        following = (int(order[at % order.shape[0]]) for at in count(position))
        return take_spans(((number, int(self.data.sizes[number])) for number in following), offset, wanted)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the sequence numbers in the order of `epoch`."""
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self._documents)
            if len(self._orders) > EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]
