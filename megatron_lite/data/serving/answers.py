"""Datasets with loss masks (--answer-loss): item i is [2, L + 1], tokens and whether each belongs to an answer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.spans import Span
from megatron_lite.data.serving.dataset import Dataset


class AnswerDataset:
    """Samples of a dataset together with their loss masks.

    Args:
        dataset: the dataset.
        masks: loss mask of each source, by the prefix of its tokens.
    """

    def __init__(self, dataset: Dataset, masks: Mapping[str, IndexedDataset]) -> None:
        self.dataset = dataset
        self.masks = masks

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources."""
        return self.dataset.sources

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Return tokens (row 0) and mask (row 1) of a sample, [2, L + 1]."""
        parts = [
            self.masks[prefix].get(sequence, offset, length)
            for prefix, (sequence, offset, length) in self.dataset.spans(sample)
        ]
        return np.stack((self.dataset[sample], np.concatenate(parts).astype(np.int64)))

    def source(self, sample: int) -> int:
        """Return the number of the source of a sample."""
        return self.dataset.source(sample)

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Return the spans of a sample's tokens, each with the prefix of its dataset."""
        return self.dataset.spans(sample)
