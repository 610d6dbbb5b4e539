"""Sample datasets: item i is int64 [L + 1], the input tokens and the labels shifted by one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.blending import BlendIndex
from megatron_lite.data.order.sample_index import SampleIndex
from megatron_lite.errors import DataError

Span = tuple[int, int, int]
"""(sequence of the file, first token in it, number of tokens)."""


class Dataset(Protocol):
    """What the loader reads from: a pure function of the sample's number."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, as `source` numbers them."""
        ...

    def __len__(self) -> int:
        """Samples that there are."""
        ...

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Tokens of a sample, [L + 1]."""
        ...

    def source(self, sample: int) -> int:
        """Number of the source that a sample is from."""
        ...

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Where a sample's tokens lie: the dataset's prefix, and the span in it, in order."""
        ...


class SpanDataset:
    """Samples read from one .bin/.idx pair; a subclass says from where.

    Args:
        data: the pair.
        vocab_size: ids must be below it; 0: not checked.
    """

    def __init__(self, data: IndexedDataset, vocab_size: int) -> None:
        self.data = data
        self.vocab_size = vocab_size

    @property
    def sources(self) -> tuple[str, ...]:
        """The one source's prefix."""
        return (self.data.prefix,)

    def source(self, sample: int) -> int:
        """0: there is one source."""
        return 0

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Where a sample's tokens lie."""
        return [(self.data.prefix, span) for span in self.find(sample)]

    def find(self, sample: int) -> list[Span]:
        """The spans of a sample."""
        raise NotImplementedError

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Tokens of a sample, [L + 1].

        Raises:
            DataError: the index is damaged there, or an id is not in the vocabulary.
        """
        spans = self.find(sample)
        parts = [self.data.get(sequence, offset, length) for sequence, offset, length in spans]
        tokens = np.concatenate(parts).astype(np.int64)
        if self.vocab_size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            for part, (sequence, offset, _) in zip(parts, spans, strict=True):
                check_tokens(
                    self.data.prefix, part, self.vocab_size, f"sequence {sequence}, from its token {offset} on"
                )
        return tokens


def check_tokens(prefix: str, tokens: NDArray[np.generic], vocab_size: int, where: str) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        DataError: there is one, `where` it says.
    """
    values = tokens.astype(np.int64)
    wrong = values[(values < 0) | (values >= vocab_size)]
    if wrong.size:
        raise DataError(
            "Every token of a dataset is an id of the tokenizer",
            found=f"{prefix} holds id {wrong[0]} ({where}), the vocabulary has {vocab_size}",
            fix="Give the tokenizer that the dataset was made with, or preprocess it again with this one",
        )


class GPTDataset(SpanDataset):
    """Documents end to end, cut into samples, in Megatron's order."""

    def __init__(self, data: IndexedDataset, index: SampleIndex, vocab_size: int = 0) -> None:
        super().__init__(data, vocab_size)
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def find(self, sample: int) -> list[Span]:
        """The spans of a sample."""
        if not 0 <= sample < len(self):
            raise out_of_samples(sample, len(self), self.sources)
        return self.index.spans(sample, self.data.sizes)


class ConcatDataset:
    """Datasets of the same source end to end: the samples that a run began with, then those that a longer run added.

    Args:
        datasets: at least one.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self._ends = list(accumulate(map(len, self.datasets)))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, which all parts share."""
        return self.datasets[0].sources

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Tokens of a sample, [L + 1]."""
        dataset, number = self._lookup(sample)
        return dataset[number]

    def source(self, sample: int) -> int:
        """Number of the source that a sample is from."""
        dataset, number = self._lookup(sample)
        return dataset.source(number)

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Where a sample's tokens lie."""
        dataset, number = self._lookup(sample)
        return dataset.spans(number)

    def _lookup(self, sample: int) -> tuple[Dataset, int]:
        if not 0 <= sample < len(self):
            raise out_of_samples(sample, len(self), self.sources)
        part = bisect_right(self._ends, sample)
        return self.datasets[part], sample - (self._ends[part - 1] if part else 0)


class BlendedDataset:
    """Several datasets in proportion to weights, in Megatron's greedy order.

    Args:
        datasets: the parts.
        weights: [datasets] normalised.
        size: samples of the blend.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], size: int) -> None:
        self.datasets = tuple(datasets)
        self.size = size
        self.index = BlendIndex(weights)
        self._sources = short_names([name for dataset in self.datasets for name in dataset.sources])

    @property
    def sources(self) -> tuple[str, ...]:
        """The parts' names, as short as the log wants them, and no two alike."""
        return self._sources

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Tokens of a sample, [L + 1]."""
        source, number = self._lookup(sample)
        return self.datasets[source][number]

    def source(self, sample: int) -> int:
        """Number of the source that a sample is from."""
        return self._lookup(sample)[0]

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Where a sample's tokens lie."""
        source, number = self._lookup(sample)
        return self.datasets[source].spans(number)

    def _lookup(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < self.size:
            raise out_of_samples(sample, self.size, self.sources)
        return self.index.lookup(sample)


def short_names(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Names for the parts of a blend: their paths without the folders that all are in.

    A file that is given several times (other ranges of it, say) is numbered, so that no loss is logged over another's.
    """
    paths = [prefix.split("/") for prefix in prefixes]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    names = ["/".join(path[shared:]) for path in paths]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    )


class MockDataset:
    """Random tokens, the same for the same sample (--mock-data)."""

    def __init__(self, size: int, seq_length: int, vocab_size: int, seed: int) -> None:
        self.size = size
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.seed = seed

    @property
    def sources(self) -> tuple[str, ...]:
        """The one source's name."""
        return ("mock",)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Tokens of a sample, [L + 1]."""
        return np.random.default_rng((self.seed, sample)).integers(0, self.vocab_size, self.seq_length + 1)

    def source(self, sample: int) -> int:
        """0: there is one source."""
        return 0

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Nowhere: the tokens are made up."""
        return []


def out_of_samples(sample: int, size: int, sources: Sequence[str]) -> DataError:
    """Return the error for a sample number that is not in a dataset.

    Every set covers what a run still reads when it starts, so this is about a number that a person gave, or a fault.
    """
    return DataError(
        "A run reads no further than its datasets were built for",
        found=f"sample {sample} of {size} in {', '.join(sources)}",
        fix="Start the run again with --load: its datasets then cover all of its samples. If it says the same, report "
        "it with the command",
    )
