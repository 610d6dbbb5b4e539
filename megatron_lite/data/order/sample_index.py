"""Sample index: Megatron's document, sample and shuffle indices, in legacy and modern order.

Sequences ("documents" here, as in Megatron's names) are shuffled epoch by epoch and concatenated to a token stream;
sample number j is tokens [j*L, j*L + L] of that stream. Sample i of the dataset is number shuffle[i]. The document of
token j*L follows from the prefix sums of the shuffled lengths. Only every 64th sum is stored: the others are cheap to
recompute and would be most of the memory at 300 million documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.order.spans import Span, take_spans
from megatron_lite.data.order.split import Order
from megatron_lite.errors import DataError

SEPARATE_BELOW: dict[Order, float] = {"legacy": 0.95, "modern": 0.80}
"""The last epoch is shuffled separately if less than this share of its samples is needed."""

BLOCK = 64
"""Documents per stored prefix sum."""

CHUNK = 1 << 20
"""Entries processed at a time, which bounds temporary arrays (a multiple of BLOCK)."""

SAMPLE_BYTES = 8
"""Bytes of memory for each sample while an index is built."""

WIDE = 2**32 - 2
"""Samples from which the shuffle index has 8 bytes an entry instead of 4."""


@dataclass(frozen=True)
class IndexPlan:
    """All inputs of a sample index, with the sizes that follow from them by arithmetic.

    Attributes:
        first: first sequence of the split.
        last: end of the split, exclusive.
        tokens_per_epoch: tokens of sequences [first, last).
        num_samples: samples that the run requests; None: one epoch.
        seq_length: L; a sample is L + 1 tokens, the last of which is the first token of the next sample.
        seed: seed of the generator that shuffles documents and then samples.
        order: generation whose threshold decides whether the last epoch is shuffled separately (SEPARATE_BELOW).
    """

    first: int
    last: int
    tokens_per_epoch: int
    num_samples: int | None
    seq_length: int
    seed: int
    order: Order

    @property
    def num_documents(self) -> int:
        """Number of sequences of one epoch."""
        return self.last - self.first

    @property
    def epochs(self) -> int:
        """Smallest number of epochs, at least one, whose tokens make num_samples samples."""
        if self.num_samples is None:
            return 1
        return max(1, -(-(self.num_samples * self.seq_length + 1) // self.tokens_per_epoch))

    @property
    def total_samples(self) -> int:
        """Number of samples of all epochs: the length of the dataset."""
        return (self.epochs * self.tokens_per_epoch - 1) // self.seq_length

    @property
    def samples_before_last(self) -> int:
        """Number of samples that end before the last epoch begins."""
        return ((self.epochs - 1) * self.tokens_per_epoch - 1) // self.seq_length if self.epochs > 1 else 0

    @property
    def separate_last_epoch(self) -> bool:
        """True if the last epoch is shuffled separately, because only a part of it is needed.

        Megatron-DeepSpeed refuses some splits of less than a few samples here; Megatron-LM's rule is used for them.
        """
        if self.epochs == 1 or self.num_samples is None:
            return False
        needed = self.num_samples - self.samples_before_last
        samples_per_epoch = (self.tokens_per_epoch - 1) // self.seq_length
        return needed < int(SEPARATE_BELOW[self.order] * samples_per_epoch)

    @property
    def build_bytes(self) -> int:
        """Peak memory of building the index in bytes, except for a few arrays of CHUNK entries."""
        documents = self.epochs * self.num_documents
        return SAMPLE_BYTES * max(documents, self.total_samples) + 4 * documents + 24 * (documents // BLOCK + 1)

    @property
    def file_bytes(self) -> int:
        """Size of the index's files in bytes."""
        documents = self.epochs * self.num_documents
        return (
            4 * documents + (4 if self.total_samples < WIDE else 8) * self.total_samples + 8 * (documents // BLOCK + 2)
        )

    @property
    def num_shuffled_documents(self) -> int:
        """Entries of the document index that are shuffled as one; the rest is the separate last epoch."""
        return (self.epochs - self.separate_last_epoch) * self.num_documents

    @property
    def num_shuffled_samples(self) -> int:
        """Entries of the shuffle index that are shuffled as one."""
        return self.samples_before_last if self.separate_last_epoch else self.total_samples


def plan_index(
    sizes: NDArray[np.int32],
    bounds: tuple[int, int],
    *,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    order: Order,
    prefix: str,
) -> IndexPlan:
    """Return the plan for sequences [bounds) of a dataset.

    Args:
        sizes: int32 [sequences] lengths of all sequences of the dataset.
        bounds: first and last (exclusive) sequence of the split.
        num_samples: samples that the run requests; None: one epoch.
        seq_length: tokens of a sample's input.
        seed: seed of the shuffles.
        order: generation of Megatron whose order is reproduced.
        prefix: path of the dataset, for the error message.

    Raises:
        DataError: the sequences hold no token, or in one epoch too few for a sample.
    """
    first, last = bounds
    tokens = sum(int(np.sum(sizes[low : min(last, low + CHUNK)], dtype=np.int64)) for low in range(first, last, CHUNK))
    if tokens < 1 or (num_samples is None and tokens <= seq_length):
        raise too_few_tokens(prefix, bounds, tokens, seq_length)
    return IndexPlan(first, last, tokens, num_samples, seq_length, seed, order)


def too_few_tokens(prefix: str, bounds: tuple[int, int], tokens: int, seq_length: int) -> DataError:
    """Return the error for a range of sequences that holds less than one sample."""
    return DataError(
        f"Sequences {bounds[0]:,} to {bounds[1]:,} of the dataset {prefix} hold {tokens:,} tokens, less than one "
        "sample of "
        f"{seq_length:,} + 1 tokens (--seq-length {seq_length})",
        fix="Use a larger dataset, give the set a larger share of it (--split), or use a smaller --seq-length",
    )


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Sample index, built or read from a cache.

    Attributes:
        plan: inputs of the index.
        documents: [epochs * num_documents] sequence numbers in the order of the token stream.
        shuffle: [total_samples] number in the stream of each sample.
        starts: int64 [blocks + 1] tokens before each BLOCK of `documents`; empty if `rows` is given.
        rows: [total_samples + 1, 2] sample index of a Megatron cache: (position in documents, offset).
    """

    plan: IndexPlan
    documents: NDArray[np.int32]
    shuffle: NDArray[np.integer]
    starts: NDArray[np.int64]
    rows: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        return self.shuffle.shape[0]

    def locate(self, number: int, sizes: NDArray[np.int32]) -> tuple[int, int]:
        """Return the beginning of sample `number` of the stream: position in `documents`, offset in that document."""
        if self.rows is not None:
            return int(self.rows[number, 0]), int(self.rows[number, 1])
        token = number * self.plan.seq_length
        block = int(np.searchsorted(self.starts, token, side="right")) - 1
        lengths = sizes[self.documents[block * BLOCK : (block + 1) * BLOCK]]
        ends = int(self.starts[block]) + np.cumsum(lengths, dtype=np.int64)
        inside = int(np.searchsorted(ends, token, side="right"))
        return block * BLOCK + inside, token - int(ends[inside] - lengths[inside])

    def spans(self, sample: int, sizes: NDArray[np.int32]) -> list[Span]:
        """Return the spans (sequence, offset, length) of sample `sample`, L + 1 tokens in total."""
        position, offset = self.locate(int(self.shuffle[sample]), sizes)
        documents = ((int(document), int(sizes[document])) for document in self.documents[position:])
        return take_spans(documents, offset, self.plan.seq_length + 1)


def build_index(plan: IndexPlan, sizes: NDArray[np.int32], prefix: str | Path = "") -> SampleIndex:
    """Shuffle documents and samples in Megatron's order, bit for bit.

    Both shuffles use one scratch array of 8 bytes for each entry of the larger index, whose front becomes the shuffle
    index: page faults on fresh memory cost a good part of the time of a shuffle.

    Raises:
        DataError: a sequence has a negative length.
    """
    rng = np.random.RandomState(plan.seed)
    scratch = np.empty(max(plan.epochs * plan.num_documents, plan.total_samples), dtype=np.int64)
    documents, starts = order_documents(rng, plan, sizes, scratch, prefix)
    return SampleIndex(plan, documents, order_samples(rng, plan, scratch), starts)


def order_documents(
    rng: np.random.RandomState,
    plan: IndexPlan,
    sizes: NDArray[np.int32],
    scratch: NDArray[np.int64],
    prefix: str | Path = "",
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Build `documents` and `starts` of the index, the first half of a build.

    Args:
        rng: generator in the state that the plan's seed gives.
        plan: the index.
        sizes: int32 [sequences] lengths of all sequences.
        scratch: int64, at least one element for each entry; overwritten.
        prefix: path of the dataset, for the error message.

    Raises:
        DataError: a sequence has a negative length.
    """
    packed = scratch[: plan.epochs * plan.num_documents]
    _pack_epochs(packed, plan, sizes, prefix)
    _shuffle(rng, packed, plan.num_shuffled_documents)
    starts = _block_starts(packed)
    return _low_halves(packed).copy(), starts


def order_samples(rng: np.random.RandomState, plan: IndexPlan, scratch: NDArray[np.int64]) -> NDArray[np.integer]:
    """Build `shuffle` of the index, the second half of a build.

    Args:
        rng: generator in the state that `order_documents` left.
        plan: the index.
        scratch: memory of the result; not to be used again.
    """
    numbers = scratch[: plan.total_samples]
    for low in range(0, plan.total_samples, CHUNK):
        numbers[low : low + CHUNK] = np.arange(low, min(plan.total_samples, low + CHUNK))
    _shuffle(rng, numbers, plan.num_shuffled_samples)
    return numbers if plan.total_samples >= WIDE else _low_halves(numbers).view(np.uint32)


def _pack_epochs(packed: NDArray[np.int64], plan: IndexPlan, sizes: NDArray[np.int32], prefix: str | Path) -> None:
    """Fill `packed`, for every entry of every epoch, with sequence number (low half) and length (high half).

    Packing avoids a random gather of the lengths after the shuffle. numpy also shuffles 8-byte integers several times
    faster than 4-byte ones, with the same draws and therefore the same order.
    """
    for low in range(plan.first, plan.last, CHUNK):
        high = min(plan.last, low + CHUNK)
        lengths = sizes[low:high].astype(np.int64)
        if lengths.min() < 0:
            raise DataError(
                f"{f'{prefix}.idx' if prefix else 'The index of the dataset'} is damaged: sequence "
                f"{low + int(np.argmin(lengths))} has length {lengths.min()}",
                fix="Copy the .bin and .idx files again from an intact copy, or preprocess the corpus again",
            )
        packed[low - plan.first : high - plan.first] = (lengths << 32) | np.arange(low, high)
    for epoch in range(1, plan.epochs):
        packed[epoch * plan.num_documents : (epoch + 1) * plan.num_documents] = packed[: plan.num_documents]


def _shuffle(rng: np.random.RandomState, values: NDArray[np.int64], count: int) -> None:
    """Shuffle values[:count], and then separately the rest, if there is any."""
    rng.shuffle(values[:count])
    if count < values.shape[0]:
        rng.shuffle(values[count:])


def _block_starts(packed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens before each block of packed entries, and the total."""
    sums = [
        np.add.reduceat(packed[low : low + CHUNK] >> 32, np.arange(0, min(CHUNK, packed.shape[0] - low), BLOCK))
        for low in range(0, packed.shape[0], CHUNK)
    ]
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(sums))])


def _low_halves(values: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the low 32 bits of each value, moved to the front of the same memory."""
    halves = values.view(np.int32)[: values.shape[0]]
    for low in range(0, values.shape[0], CHUNK):
        halves[low : low + CHUNK] = values[low : low + CHUNK].astype(np.uint32).view(np.int32)
    return halves
