"""Training data pipeline of one replica: a loader per split, conversion of its samples to device micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_lite.backend.base import Backend
from megatron_lite.config.data import DataConfig
from megatron_lite.data.order.set_plan import SetPlan
from megatron_lite.data.serving import masks
from megatron_lite.data.serving.loader import Loader
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.microbatches import microbatch_number
from megatron_lite.train.engine import BatchReader


@dataclass
class RunData:
    """Loaders of a run's datasets, and the settings by which their tokens become micro-batches.

    Attributes:
        backend: moves micro-batches to the device.
        config: which masks and position ids are computed from the ends of documents.
        eod: the end-of-document token; read only if `config` asks for one of those.
        train: the training data; None for a run that only evaluates.
        valid: validation sets by name.
        test: test sets by name.
        plans: what the datasets were built from, by split and name.
        warnings: messages of opening the datasets, for the reporter.
    """

    backend: Backend
    config: DataConfig
    eod: int
    train: Loader | None = None
    valid: dict[str, Loader] = field(default_factory=dict)
    test: dict[str, Loader] = field(default_factory=dict)
    plans: dict[str, dict[str, SetPlan]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def train_plan(self) -> SetPlan | None:
        """Plan of the training set; None for a run that only evaluates."""
        return next(iter(self.plans.get("train", {}).values()), None)

    def train_reader(self, plan: IterationPlan) -> BatchReader:
        """Return the function that reads the micro-batches of a training iteration."""
        assert self.train is not None, "a run that trains has training data"
        return self.reader(self.train, plan.first_sample, plan.seq_length)

    def reader(self, loader: Loader, consumed: int, seq_length: int) -> BatchReader:
        """Return the function that reads the micro-batches of the iteration that begins after `consumed` samples.

        Args:
            loader: one of this object's loaders.
            consumed: samples consumed before.
            seq_length: tokens of each sample; shorter than the dataset's under a curriculum.
        """

        def read(index: int) -> MicroBatch:
            return self._to_batch(loader, loader.microbatch(consumed, index, seq_length), consumed, index)

        return read

    def close(self) -> None:
        """Stop the prefetch thread of every loader."""
        for loader in (self.train, *self.valid.values(), *self.test.values()):
            if loader is not None:
                loader.close()

    def _to_batch(self, loader: Loader, samples: NDArray[np.int64], consumed: int, index: int) -> MicroBatch:
        """Convert samples [b, s + 1], or [b, 2, s + 1] with loss masks, to a micro-batch on the device."""
        config, eod, to_device = self.config, self.eod, self.backend.to_device
        mask = None
        if samples.ndim == 3:
            # A label is an answer if its own token is: the mask is shifted as the labels are.
            samples, mask = samples[:, 0], samples[:, 1, 1:].astype(np.float32)
        tokens = np.ascontiguousarray(samples[:, :-1])
        if config.eod_mask_loss:
            ends = masks.loss_mask(tokens, eod)
            mask = ends if mask is None else mask * ends
        sources = None
        if len(loader.names) > 1:
            sources = tuple(loader.sources(loader.start(consumed, index), loader.micro_batch).tolist())
        documents = None
        if config.reset_attention_mask and (rows := masks.document_rows(masks.document_ids(tokens, eod))) is not None:
            order, inverse, groups = rows
            documents = Documents(to_device(order), to_device(inverse), groups)
        return MicroBatch(
            tokens=to_device(tokens),
            labels=to_device(np.ascontiguousarray(samples[:, 1:])),
            loss_mask=None if mask is None else to_device(mask),
            position_ids=to_device(masks.position_ids(tokens, eod)) if config.reset_position_ids else None,
            documents=documents,
            number=microbatch_number(loader.dp, loader.replica, index),
            sources=sources,
        )
