"""What a batch source makes of tokens: where documents end, found before anything is on a device."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.data import DataConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.data.dataset import MockDataset
from megatron_lite.data.loader import Loader
from megatron_lite.train.batches import BatchSource

EOD = 7
SAMPLES = (
    (1, 2, EOD, 3, EOD, EOD, EOD),
    (1, 2, 3, 4, 5, 6, 1),
    (1, 2, EOD, 3, 4, EOD, 5),
    (1, 2, 3, 4, 5, EOD, 6),  # the last input ends a document, and none begins behind it
)


class Written(MockDataset):
    """The samples above."""

    def __init__(self):
        super().__init__(len(SAMPLES), len(SAMPLES[0]) - 1, EOD + 1, 0)

    def __getitem__(self, sample):
        return np.array(SAMPLES[sample])


def read(consumed, size, reset_attention_mask=True):
    backend = select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch())
    loader = Loader(Written(), micro_batch=size, global_batch=lambda consumed: size, prefetch=0)
    data = dataclasses.replace(DataConfig(), reset_attention_mask=reset_attention_mask)
    return BatchSource(loader, backend, data, EOD).reader_at(consumed, 6)(0)


def test_documents_are_grouped_by_their_length():
    batch = read(0, 3)
    assert batch.documents.groups == ((1, 1), (1, 2), (3, 3), (1, 6))
    parts = batch.documents.apart(batch.tokens.t())
    assert [part.tolist() for part in parts] == [
        [[EOD]],
        [[3], [EOD]],
        [[1, 1, 3], [2, 2, 4], [EOD, EOD, EOD]],
        [[1], [2], [3], [4], [5], [6]],
    ]
    assert torch.equal(batch.documents.together(parts, 6), batch.tokens.t())


@pytest.mark.parametrize(("consumed", "reset"), [(1, True), (3, True), (0, False)])
def test_nothing_where_there_is_nothing_to_keep_apart(consumed, reset):
    batch = read(consumed, 1, reset)
    assert batch.documents is None and batch.document_ids is None
