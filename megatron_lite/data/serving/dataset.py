"""Token sample datasets: item i is int64 [L + 1] tokens, the input and the labels shifted by one."""

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
from megatron_lite.data.order.spans import Span
from megatron_lite.errors import DataError, report_bug


class Dataset(Protocol):
    """Interface of datasets: tokens and source of a sample are pure functions of its number."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, indexed by `source`."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Return the tokens of a sample, [L + 1]; with a loss mask (answers.py) [2, L + 1]."""
        ...

    def source(self, sample: int) -> int:
        """Return the number of the source of a sample."""
        ...

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Return the spans of a sample's tokens in order, each with the prefix of its dataset."""
        ...


class SpanDataset:
    """Base of datasets on one .bin/.idx pair; subclasses define their length and the spans of a sample (`locate`).

    Args:
        data: the .bin/.idx pair.
        vocab_size: upper bound of token ids; 0: not checked.
    """

    def __init__(self, data: IndexedDataset, vocab_size: int) -> None:
        self.data = data
        self.vocab_size = vocab_size

    @property
    def sources(self) -> tuple[str, ...]:
        """Prefix of the pair, as the only source."""
        return (self.data.prefix,)

    def source(self, sample: int) -> int:
        """Return 0: there is one source."""
        return 0

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Return the spans of a sample's tokens, each with the prefix of its dataset."""
        return [(self.data.prefix, span) for span in self._find(sample)]

    def __len__(self) -> int:
        raise NotImplementedError

    def locate(self, sample: int) -> list[Span]:
        """Return the spans of sample number 0 <= sample < len(self)."""
        raise NotImplementedError

    def _find(self, sample: int) -> list[Span]:
        if not 0 <= sample < len(self):
            raise out_of_samples(sample, len(self), self.sources)
        return self.locate(sample)

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Return the tokens of a sample, [L + 1].

        Raises:
            DataError: the sample does not exist, the index is damaged there, or a token id is outside the vocabulary.
        """
        spans = self._find(sample)
        parts = [self.data.get(sequence, offset, length) for sequence, offset, length in spans]
        tokens = np.concatenate(parts).astype(np.int64)
        if self.vocab_size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            for part, (sequence, offset, _) in zip(parts, spans, strict=True):
                check_tokens(self.data.prefix, part, self.vocab_size, f"sequence {sequence}, from token {offset}")
        return tokens


def check_tokens(prefix: str, tokens: NDArray[np.generic], vocab_size: int, where: str) -> None:
    """Check that token ids are in the vocabulary.

    Args:
        prefix: path of the dataset, for the error message.
        tokens: token ids.
        vocab_size: upper bound of token ids.
        where: location of the tokens in the dataset, for the error message.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    values = tokens.astype(np.int64)
    wrong = values[(values < 0) | (values >= vocab_size)]
    if wrong.size:
        raise DataError(
            f"The dataset {prefix} contains token id {wrong[0]} ({where}), but the vocabulary has {vocab_size:,} "
            "entries",
            fix="Give the tokenizer that the dataset was made with, or preprocess the corpus again with this one",
        )


class GPTDataset(SpanDataset):
    """Samples of concatenated documents in Megatron's order, given by a sample index."""

    def __init__(self, data: IndexedDataset, index: SampleIndex, vocab_size: int = 0) -> None:
        super().__init__(data, vocab_size)
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def locate(self, sample: int) -> list[Span]:
        """Return the spans of a sample."""
        return self.index.spans(sample, self.data.sizes)


class ConcatDataset:
    """Concatenation of datasets of one source: the samples that a run began with, then those of its extensions.

    Args:
        datasets: at least one dataset.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self._ends = list(accumulate(map(len, self.datasets)))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, which all datasets share."""
        return self.datasets[0].sources

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Return the tokens of a sample, [L + 1]."""
        dataset, number = self._lookup(sample)
        return dataset[number]

    def source(self, sample: int) -> int:
        """Return the number of the source of a sample."""
        dataset, number = self._lookup(sample)
        return dataset.source(number)

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Return the spans of a sample's tokens, each with the prefix of its dataset."""
        dataset, number = self._lookup(sample)
        return dataset.spans(number)

    def _lookup(self, sample: int) -> tuple[Dataset, int]:
        if not 0 <= sample < len(self):
            raise out_of_samples(sample, len(self), self.sources)
        index = bisect_right(self._ends, sample)
        return self.datasets[index], sample - (self._ends[index - 1] if index else 0)


class BlendedDataset:
    """Weighted blend of datasets in Megatron's greedy order.

    Args:
        datasets: the sources.
        weights: [datasets], normalized.
        size: samples of the blend.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], size: int) -> None:
        self.datasets = tuple(datasets)
        self.size = size
        self.index = BlendIndex(weights)
        self._sources = short_names([name for dataset in self.datasets for name in dataset.sources])

    @property
    def sources(self) -> tuple[str, ...]:
        """Unique short names of the sources."""
        return self._sources

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Return the tokens of a sample, [L + 1]."""
        source, number = self._lookup(sample)
        return self.datasets[source][number]

    def source(self, sample: int) -> int:
        """Return the number of the source of a sample."""
        return self._lookup(sample)[0]

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Return the spans of a sample's tokens, each with the prefix of its dataset."""
        source, number = self._lookup(sample)
        return self.datasets[source].spans(number)

    def _lookup(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < self.size:
            raise out_of_samples(sample, self.size, self.sources)
        return self.index.lookup(sample)


def short_names(prefixes: Sequence[str]) -> tuple[str, ...]:
    """Return unique names for the sources of a blend: their paths without the common parent folders.

    A file that is given several times (for example with different ranges) is numbered, so that each loss has its own
    name.
    """
    paths = [prefix.split("/") for prefix in prefixes]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    names = ["/".join(path[shared:]) for path in paths]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    )


class MockDataset:
    """Random tokens seeded by the sample's number (--mock-data)."""

    def __init__(self, size: int, seq_length: int, vocab_size: int, seed: int) -> None:
        self.size = size
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.seed = seed

    @property
    def sources(self) -> tuple[str, ...]:
        """Name of the only source."""
        return ("mock",)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sample: int) -> NDArray[np.int64]:
        """Return the tokens of a sample, [L + 1]."""
        return np.random.default_rng((self.seed, sample)).integers(0, self.vocab_size, self.seq_length + 1)

    def source(self, sample: int) -> int:
        """Return 0: there is one source."""
        return 0

    def spans(self, sample: int) -> list[tuple[str, Span]]:
        """Return no span: the tokens are in no file."""
        return []


def out_of_samples(sample: int, size: int, sources: Sequence[str]) -> DataError:
    """Return the error for a sample number outside a dataset.

    Every set is built to cover the run, so the number comes from a command line, or from a bug.
    """
    return DataError(
        f"Sample {sample:,} of the dataset {', '.join(sources)} was requested, but the index of this run has the "
        f"samples 0 to {size - 1:,}",
        fix="Give the same training command with --load of its --save folder: it resumes, with an index of all samples "
        f"that the run needs. If the error comes again: {report_bug()}",
    )
