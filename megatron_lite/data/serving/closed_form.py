"""Closed-form sample order (--sample-order closed-form): a sample's token range follows from its number.

The documents of a split, in the order of the file, are cut every seq_length tokens. Sample i of an epoch is range
perm(i), where `perm` is a keyed permutation with another key in each epoch. A sample follows from (seed, epoch, i) and
two entries of the .idx, so nothing is built, kept in memory or written, and the order does not depend on the length of
the run.
"""

from __future__ import annotations

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.permutation import permute, round_keys
from megatron_lite.data.order.sample_index import too_few_tokens
from megatron_lite.data.order.spans import Span, take_spans
from megatron_lite.data.serving.dataset import SpanDataset


def samples_per_epoch(data: IndexedDataset, bounds: tuple[int, int], seq_length: int) -> int:
    """Return the samples of sequences [bounds); up to seq_length tokens at their end belong to none.

    Raises:
        DataError: the sequences hold fewer tokens than one sample, or the index is damaged.
    """
    tokens = data.count_tokens(*bounds)
    if tokens <= seq_length:
        raise too_few_tokens(data.prefix, bounds, tokens, seq_length)
    return (tokens - 1) // seq_length


class ClosedFormDataset(SpanDataset):
    """Dataset of any number of epochs of consecutive token ranges.

    Args:
        data: the .bin/.idx pair.
        bounds: first and last (exclusive) sequence.
        num_samples: number of samples; None: one epoch.
        seq_length: L.
        seed: key of the permutations.
        vocab_size: upper bound of token ids; 0: not checked.

    Raises:
        DataError: the sequences hold fewer tokens than one sample, or the index is damaged.
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
        self.bounds = bounds
        self.seq_length = seq_length
        self.seed = seed
        self.epoch_samples = samples_per_epoch(data, bounds, seq_length)
        self.size = self.epoch_samples if num_samples is None else num_samples

    def __len__(self) -> int:
        return self.size

    def locate(self, sample: int) -> list[Span]:
        """Return the spans of a sample.

        Raises:
            DataError: the index is damaged.
        """
        epoch, number = divmod(sample, self.epoch_samples)
        token = permute(number, self.epoch_samples, round_keys(self.seed, epoch)) * self.seq_length
        document, offset = self.data.find_token(token, *self.bounds)
        documents = ((number, self.data.length(number)) for number in range(document, self.bounds[1]))
        return take_spans(documents, offset, self.seq_length + 1)
