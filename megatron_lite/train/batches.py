"""Micro-batch source: converts the loader's numpy tokens to device tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_lite.backend.base import Backend
from megatron_lite.config.data import DataConfig
from megatron_lite.data.order.set_plan import SetPlan
from megatron_lite.data.serving import masks
from megatron_lite.data.serving.loader import Loader
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.microbatches import microbatch_number
from megatron_lite.schedules.skipping import Ranges
from megatron_lite.train.engine import BatchReader


class BatchSource:
    """Reads one dataset's micro-batches for this replica.

    Args:
        loader: tokens as a function of consumed samples.
        backend: where micro-batches go.
        data: which masks and positions are made at document ends.
        eod: the end-of-document token; read only if `data` asks for one of those.
        plan: what the dataset was built from; None: unknown.
    """

    def __init__(
        self, loader: Loader, backend: Backend, data: DataConfig, eod: int, plan: SetPlan | None = None
    ) -> None:
        self._loader = loader
        self._backend = backend
        self._data = data
        self._eod = eod
        self.names = tuple(loader.dataset.sources)
        self.plan = plan

    def reader(self, plan: IterationPlan) -> BatchReader:
        """Reads the micro-batches of a training iteration."""
        return self.reader_at(plan.first_sample, plan.seq_length)

    def reader_at(self, consumed: int, seq_length: int) -> BatchReader:
        """Reads the micro-batches of the iteration that begins after `consumed` samples.

        Args:
            consumed: samples consumed before.
            seq_length: tokens of each sample; shorter than the dataset's under a curriculum.
        """

        def read(index: int) -> MicroBatch:
            return self._to_batch(self._loader.microbatch(consumed, index, seq_length), consumed, index)

        return read

    def describe(self, plan: IterationPlan) -> str:
        """The plan's samples by their numbers in the dataset, for the message after a loss that is not finite."""
        numbers = self._loader.samples(plan.first_sample, plan.global_batch)
        return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")

    def places(self, consumed: int, count: int) -> list[int]:
        """Places in the data's order of the samples that follow `consumed` others."""
        return self._loader.places(consumed, count)

    def numbers(self, consumed: int, count: int) -> list[int]:
        """Numbers in the dataset of the samples that follow `consumed` others."""
        return self._loader.samples(consumed, count)

    def leave_out(self, skipped: Ranges) -> None:
        """Leaves these places in the data's order out of what is read from now on."""
        self._loader.skipped = skipped

    def by_source(self, losses: Mapping[int, float]) -> dict[str, float]:
        """Losses by the sources' names instead of their numbers."""
        return {self.names[number]: loss for number, loss in losses.items()}

    def close(self) -> None:
        """Stops reading ahead."""
        self._loader.close()

    def _to_batch(self, samples: np.ndarray, consumed: int, index: int) -> MicroBatch:
        """Samples [b, s + 1] -> a micro-batch."""
        loader, data = self._loader, self._data
        tokens = np.ascontiguousarray(samples[:, :-1])
        to_device = self._backend.to_device
        sources = None
        if len(self.names) > 1:
            sources = tuple(loader.sources(loader.start(consumed, index), loader.micro_batch).tolist())
        return MicroBatch(
            tokens=to_device(tokens),
            labels=to_device(np.ascontiguousarray(samples[:, 1:])),
            loss_mask=to_device(masks.loss_mask(tokens, self._eod)) if data.eod_mask_loss else None,
            position_ids=to_device(masks.position_ids(tokens, self._eod)) if data.reset_position_ids else None,
            documents=self._documents(tokens),
            number=microbatch_number(loader.dp, loader.replica, index),
            sources=sources,
        )

    def _documents(self, tokens: np.ndarray) -> Documents | None:
        """Return the documents within `tokens` [b, s] if attention is restricted to them; None: one per sample."""
        found = masks.document_rows(masks.document_ids(tokens, self._eod)) if self._data.reset_attention_mask else None
        if found is None:
            return None
        order, inverse, groups = found
        return Documents(self._backend.to_device(order), self._backend.to_device(inverse), groups)


@dataclass
class RunData:
    """What a run reads; `train` is there unless it only evaluates."""

    train: BatchSource | None = None
    valid: dict[str, BatchSource] = field(default_factory=dict)
    test: dict[str, BatchSource] = field(default_factory=dict)

    def close(self) -> None:
        """Stops every loader."""
        for source in (self.train, *self.valid.values(), *self.test.values()):
            if source is not None:
                source.close()
