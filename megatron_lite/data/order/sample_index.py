"""Sample index: Megatron's document, sample and shuffle indices, in the legacy and the modern order.

Sequences ("documents" here, as in Megatron's names) are shuffled epoch by epoch and laid end to end, and sample number
j is tokens [j*L, j*L + L] of that stream. Sample i of the dataset is number shuffle[i]. Where token j*L lies follows
from the prefix sums of the shuffled lengths; only every 64th sum is kept, because the rest costs nothing to redo and
would be most of the memory at 300 million documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.order.split import Order
from megatron_lite.errors import DataError

SEPARATE_BELOW: dict[Order, float] = {"legacy": 0.95, "modern": 0.80}
"""A last epoch of which less than this share of samples is needed is shuffled apart from those before it."""

BLOCK = 64
"""Documents per stored prefix sum."""

CHUNK = 1 << 20
"""Entries worked on at a time, so that temporary arrays stay small (a multiple of BLOCK)."""

SAMPLE_BYTES = 8
"""Bytes of memory for each sample while an index is built."""

WIDE = 2**32 - 2
"""Samples from which the shuffle index has 8 bytes an entry instead of 4."""


@dataclass(frozen=True)
class IndexPlan:
    """Everything that decides an index, and what follows from it by arithmetic alone.

    Attributes:
        first: the split is sequences [first, last) of the file.
        tokens_per_epoch: tokens in them.
        num_samples: samples that the run asks for; None: one epoch.
        seq_length: L; a sample is L + 1 tokens, of which the last is the next sample's first.
        seed: of the one generator that shuffles documents and then samples.
        order: whose threshold decides whether the last epoch is separate.
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
        """Sequences of one epoch."""
        return self.last - self.first

    @property
    def epochs(self) -> int:
        """The fewest epochs, at least one, whose tokens make num_samples samples."""
        if self.num_samples is None:
            return 1
        return max(1, -(-(self.num_samples * self.seq_length + 1) // self.tokens_per_epoch))

    @property
    def total_samples(self) -> int:
        """Samples of all epochs: the length of the dataset."""
        return (self.epochs * self.tokens_per_epoch - 1) // self.seq_length

    @property
    def samples_before_last(self) -> int:
        """Samples that begin and end before the last epoch does."""
        return ((self.epochs - 1) * self.tokens_per_epoch - 1) // self.seq_length if self.epochs > 1 else 0

    @property
    def separate_last_epoch(self) -> bool:
        """Whether the last epoch is shuffled on its own, because only a part of it is needed.

        Megatron-DeepSpeed refuses some splits of less than a few samples here; they follow Megatron-LM's rule.
        """
        if self.epochs == 1 or self.num_samples is None:
            return False
        needed = self.num_samples - self.samples_before_last
        samples_per_epoch = (self.tokens_per_epoch - 1) // self.seq_length
        return needed < int(SEPARATE_BELOW[self.order] * samples_per_epoch)

    @property
    def build_bytes(self) -> int:
        """Memory that building the index takes at its peak, apart from a few CHUNKs."""
        documents = self.epochs * self.num_documents
        return SAMPLE_BYTES * max(documents, self.total_samples) + 4 * documents + 24 * (documents // BLOCK + 1)

    @property
    def file_bytes(self) -> int:
        """Bytes of the index's files."""
        documents = self.epochs * self.num_documents
        return (
            4 * documents + (4 if self.total_samples < WIDE else 8) * self.total_samples + 8 * (documents // BLOCK + 2)
        )

    @property
    def documents_together(self) -> int:
        """Entries of the document index that are shuffled together; the rest is the separate last epoch."""
        return (self.epochs - self.separate_last_epoch) * self.num_documents

    @property
    def samples_together(self) -> int:
        """Entries of the shuffle index that are shuffled together."""
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
    """The plan for sequences [bounds) of the dataset `prefix`, whose lengths are `sizes`.

    Raises:
        DataError: they hold too few tokens for one sample in one epoch and none were asked for, or none at all.
    """
    first, last = bounds
    tokens = sum(int(np.sum(sizes[low : min(last, low + CHUNK)], dtype=np.int64)) for low in range(first, last, CHUNK))
    wanted = num_samples if num_samples is not None else 1
    if tokens < 1 or (num_samples is None and tokens <= seq_length):
        raise DataError(
            "A dataset has tokens for at least one sample",
            found=f"sequences {first} to {last} of {prefix} hold {tokens} tokens, {wanted} samples of "
            f"{seq_length} + 1 are asked for",
            fix="Give more text, another --split, or a smaller --seq-length",
        )
    return IndexPlan(first, last, tokens, num_samples, seq_length, seed, order)


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """An index, built or read from a cache.

    Attributes:
        plan: what it was built from.
        documents: [epochs * num_documents] sequence numbers in the order in which they are laid end to end.
        shuffle: [total_samples] number in the stream of each sample.
        starts: int64 [blocks + 1] tokens before each BLOCK of `documents`; empty where `rows` is given.
        rows: [total_samples + 1, 2] Megatron's sample index from its cache: (position in documents, offset).
    """

    plan: IndexPlan
    documents: NDArray[np.int32]
    shuffle: NDArray[np.integer]
    starts: NDArray[np.int64]
    rows: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        return self.shuffle.shape[0]

    def locate(self, number: int, sizes: NDArray[np.int32]) -> tuple[int, int]:
        """Where sample `number` of the stream begins: position in `documents`, and offset in that document."""
        if self.rows is not None:
            return int(self.rows[number, 0]), int(self.rows[number, 1])
        token = number * self.plan.seq_length
        block = int(np.searchsorted(self.starts, token, side="right")) - 1
        lengths = sizes[self.documents[block * BLOCK : (block + 1) * BLOCK]]
        ends = int(self.starts[block]) + np.cumsum(lengths, dtype=np.int64)
        inside = int(np.searchsorted(ends, token, side="right"))
        return block * BLOCK + inside, token - int(ends[inside] - lengths[inside])

    def spans(self, sample: int, sizes: NDArray[np.int32]) -> list[tuple[int, int, int]]:
        """The pieces (sequence, offset, length) of sample `sample`, L + 1 tokens in all."""
        position, offset = self.locate(int(self.shuffle[sample]), sizes)
        left = self.plan.seq_length + 1
        found = []
        while left > 0:
            document = int(self.documents[position])
            length = min(left, int(sizes[document]) - offset)
            if length > 0:
                found.append((document, offset, length))
                left -= length
            position, offset = position + 1, 0
        return found


def build_index(plan: IndexPlan, sizes: NDArray[np.int32]) -> SampleIndex:
    """Shuffle documents and samples as Megatron does, bit for bit.

    Both go through one scratch array of 8 bytes for each entry of the larger index, in whose front the shuffle stays;
    memory touched for the first time costs as much as a good part of a shuffle.

    Raises:
        DataError: a sequence has a negative length.
    """
    rng = np.random.RandomState(plan.seed)
    scratch = np.empty(max(plan.epochs * plan.num_documents, plan.total_samples), dtype=np.int64)
    documents, starts = order_documents(rng, plan, sizes, scratch)
    return SampleIndex(plan, documents, order_samples(rng, plan, scratch), starts)


def order_documents(
    rng: np.random.RandomState, plan: IndexPlan, sizes: NDArray[np.int32], scratch: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The first half of a build: `documents` and `starts` of the index.

    Args:
        rng: as it is made from the plan's seed.
        plan: of the index.
        sizes: lengths of all sequences.
        scratch: overwritten; at least one place for each entry.

    Raises:
        DataError: a sequence has a negative length.
    """
    packed = scratch[: plan.epochs * plan.num_documents]
    _pack_epochs(packed, plan, sizes)
    _shuffle(rng, packed, plan.documents_together)
    starts = _block_starts(packed)
    return _low_halves(packed).copy(), starts


def order_samples(rng: np.random.RandomState, plan: IndexPlan, scratch: NDArray[np.int64]) -> NDArray[np.integer]:
    """The second half of a build: `shuffle` of the index, from the generator as `order_documents` left it.

    It lies in `scratch`, which is not to be used again.
    """
    numbers = scratch[: plan.total_samples]
    for low in range(0, plan.total_samples, CHUNK):
        numbers[low : low + CHUNK] = np.arange(low, min(plan.total_samples, low + CHUNK))
    _shuffle(rng, numbers, plan.samples_together)
    return numbers if plan.total_samples >= WIDE else _low_halves(numbers).view(np.uint32)


def _pack_epochs(packed: NDArray[np.int64], plan: IndexPlan, sizes: NDArray[np.int32]) -> None:
    """Fill `packed`, for every entry of every epoch, with sequence number (low half) and length (high half).

    Shuffled together, the lengths need not be gathered afterwards from all over memory; and numpy shuffles integers of
    this size several times faster than those of 4 bytes, with the same draws and so to the same order.
    """
    for low in range(plan.first, plan.last, CHUNK):
        high = min(plan.last, low + CHUNK)
        lengths = sizes[low:high].astype(np.int64)
        if lengths.min() < 0:
            raise DataError(
                "A sequence has no negative length",
                found=f"sequence {low + int(np.argmin(lengths))} has {lengths.min()} tokens",
                fix="Preprocess the corpus again",
            )
        packed[low - plan.first : high - plan.first] = (lengths << 32) | np.arange(low, high)
    for epoch in range(1, plan.epochs):
        packed[epoch * plan.num_documents : (epoch + 1) * plan.num_documents] = packed[: plan.num_documents]


def _shuffle(rng: np.random.RandomState, values: NDArray[np.int64], together: int) -> None:
    """Shuffle values[:together], and then the rest, if there is one, by itself."""
    rng.shuffle(values[:together])
    if together < values.shape[0]:
        rng.shuffle(values[together:])


def _block_starts(packed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens before each block of packed entries, and after the last."""
    sums = [
        np.add.reduceat(packed[low : low + CHUNK] >> 32, np.arange(0, min(CHUNK, packed.shape[0] - low), BLOCK))
        for low in range(0, packed.shape[0], CHUNK)
    ]
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.concatenate(sums))])


def _low_halves(values: NDArray[np.int64]) -> NDArray[np.int32]:
    """The low 32 bits of each value, moved to the front of the values' own memory."""
    halves = values.view(np.int32)[: values.shape[0]]
    for low in range(0, values.shape[0], CHUNK):
        halves[low : low + CHUNK] = values[low : low + CHUNK].astype(np.uint32).view(np.int32)
    return halves
