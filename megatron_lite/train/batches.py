"""Training data pipeline of one rank: a loader per split, conversion of its samples to device micro-batches.

A thread reads and converts the samples into (pinned) host memory; the main thread enqueues the copies to the device. A
rank prepares only what its pipeline stages read; stages in the middle of a pipeline usually read nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_lite.backend.base import Backend
from megatron_lite.config.partition import num_stages
from megatron_lite.config.run import RunConfig
from megatron_lite.data.order.set_plan import SetPlan
from megatron_lite.data.serving import masks
from megatron_lite.data.serving.loader import Loader
from megatron_lite.data.serving.read_ahead import Place, ReadAhead
from megatron_lite.model.batch import Documents, MicroBatch
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.microbatches import microbatch_number
from megatron_lite.schedules.pipeline import rank_of_stage
from megatron_lite.train.engine import BatchReader


@dataclass(frozen=True)
class BatchParts:
    """Parts of a micro-batch that the stages of a rank read."""

    tokens: bool = True
    labels: bool = True
    loss_mask: bool = False
    position_ids: bool = False
    documents: bool = False

    @property
    def any(self) -> bool:
        """Return whether the rank reads data at all."""
        return self.tokens or self.labels or self.position_ids or self.documents


def batch_parts(config: RunConfig, *, first: bool, last: bool) -> BatchParts:
    """Return the parts of a micro-batch that a rank reads.

    Args:
        config: model, and the masks and positions that follow from the ends of documents.
        first: the rank has the first stage, with the embedding.
        last: the rank has the last stage, with the loss.
    """
    data, positions = config.data, config.model.position_embedding
    return BatchParts(
        tokens=first,
        labels=last,
        loss_mask=last and data.eod_mask_loss,
        # Learned positions are added to the embedding; rotary ones rotate queries and keys of every layer.
        position_ids=data.reset_position_ids and (positions == "rotary" or (first and positions == "learned")),
        documents=data.reset_attention_mask,
    )


def rank_batch_parts(config: RunConfig, pp_rank: int) -> BatchParts:
    """Return the parts of a micro-batch that the stages of a pipeline rank read."""
    parallel = config.parallel
    first, last = (
        rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage) == pp_rank
        for stage in (0, num_stages(config.model, parallel) - 1)
    )
    return batch_parts(config, first=first, last=last)


@dataclass
class RunData:
    """Loaders of a run's datasets, and the settings by which their tokens become micro-batches.

    Attributes:
        backend: moves micro-batches to the device.
        parts: of a micro-batch, that this rank reads.
        eod: the end-of-document token; read only if `parts` has masks, position ids or documents.
        prefetch: micro-batches that a thread prepares ahead; 0: each is prepared on request.
        train: the training data; None for a run that only evaluates.
        valid: validation sets by name.
        test: test sets by name.
        plans: what the datasets were built from, by split and name.
        warnings: messages of opening the datasets, for the reporter.
    """

    backend: Backend
    parts: BatchParts
    eod: int
    prefetch: int
    train: Loader | None = None
    valid: dict[str, Loader] = field(default_factory=dict)
    test: dict[str, Loader] = field(default_factory=dict)
    plans: dict[str, dict[str, SetPlan]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _ahead: dict[int, ReadAhead[MicroBatch]] = field(default_factory=dict)
    """By id of the loader."""

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
            place = Place(consumed, index, seq_length)
            if not self.parts.any:
                return self._empty(loader, place)
            if id(loader) not in self._ahead:
                self._ahead[id(loader)] = ReadAhead(
                    lambda place: self._host_batch(loader, place),
                    loader.following,
                    self.prefetch,
                    self.backend.use_in_thread,
                )
            return self._ahead[id(loader)](place).to(self.backend.to_device)

        return read

    def close(self) -> None:
        """Stop the threads."""
        for ahead in self._ahead.values():
            ahead.close()

    def _empty(self, loader: Loader, place: Place) -> MicroBatch:
        number = microbatch_number(loader.dp, loader.replica, place.microbatch)
        return MicroBatch(shape=(loader.micro_batch, place.length), number=number)

    def _host_batch(self, loader: Loader, place: Place) -> MicroBatch:
        """Make a micro-batch in host memory of a place's samples: [b, s + 1], or [b, 2, s + 1] with loss masks."""
        parts, eod, host = self.parts, self.eod, self.backend.host_tensor
        samples, mask = loader.microbatch(*place), None
        if samples.ndim == 3:
            # A label is an answer if its own token is: the mask is shifted as the labels are.
            samples, mask = samples[:, 0], samples[:, 1, 1:].astype(np.float32)
        tokens = np.ascontiguousarray(samples[:, :-1])
        if parts.loss_mask:
            ends = masks.loss_mask(tokens, eod)
            mask = ends if mask is None else mask * ends
        sources = None
        if parts.labels and len(loader.names) > 1:
            start = loader.start(place.consumed, place.microbatch)
            sources = tuple(loader.sources(start, loader.micro_batch).tolist())
        documents = None
        if parts.documents and (rows := masks.document_rows(masks.document_ids(tokens, eod))) is not None:
            documents = Documents(host(rows.order), host(rows.inverse), rows.groups, host(rows.cu_seqlens))
        batch = self._empty(loader, place)
        batch.tokens = host(tokens) if parts.tokens else None
        batch.labels = host(np.ascontiguousarray(samples[:, 1:])) if parts.labels else None
        batch.loss_mask = host(mask) if mask is not None and parts.labels else None
        batch.position_ids = host(masks.position_ids(tokens, eod)) if parts.position_ids else None
        batch.documents, batch.sources = documents, sources
        return batch
