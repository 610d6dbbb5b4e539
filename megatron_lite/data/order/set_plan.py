"""Dataset plans: files, document ranges and index sizes of each split, computed without building an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.config.data import DataSource
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.sample_index import IndexPlan


@dataclass(frozen=True)
class SourcePlan:
    """Plan of one source of a set: an opened file, its range of sequences, and the sample indices that cover the run.

    Attributes:
        source: path, weight and range from the config.
        data: the opened file.
        bounds: first and last (exclusive) sequence of the file that the set reads.
        indices: one for the samples requested when the run began, and one for the additional samples of each later
            extension of the run; none for orders without an index (--sample-order closed-form, --document-sampling
            slice).
        asked: samples requested of the source in total; None: one epoch.
        epoch_samples: samples of one epoch; with an index, the last one may end in the next epoch.
    """

    source: DataSource
    data: IndexedDataset
    bounds: tuple[int, int]
    indices: tuple[IndexPlan, ...] = ()
    asked: int | None = None
    epoch_samples: float = 0.0

    @property
    def size(self) -> int:
        """Number of whole samples in one epoch."""
        return self.indices[0].total_samples if self.indices else int(self.epoch_samples)


@dataclass(frozen=True)
class SetPlan:
    """Plan of one set of a split; several validation groups are several sets.

    Attributes:
        split: train, valid or test.
        name: name of the split or of the group.
        size: samples requested of the set.
        sources: sources in the order of the blend; none for --mock-data.
        shares: share of each source in the blend, summing to 1; empty for a single source without a blend.
        cache_name: name of the set in the file names of Megatron's index caches.
        cache_split: value of --split in their descriptions.
    """

    split: str
    name: str
    size: int
    sources: tuple[SourcePlan, ...] = ()
    shares: tuple[float, ...] = ()
    cache_name: str = ""
    cache_split: str = ""

    @property
    def indices(self) -> tuple[IndexPlan, ...]:
        """Plans of the sample indices of all sources."""
        return tuple(index for source in self.sources for index in source.indices)

    @property
    def epochs(self) -> tuple[float, ...]:
        """Epochs of each source in `size` samples; 0 for --mock-data."""
        shares = self.shares or (1.0,)
        if not self.sources:
            return (0.0,)
        return tuple(
            self.size * share / max(1.0, source.epoch_samples)
            for share, source in zip(shares, self.sources, strict=True)
        )


def describe_set(plan: SetPlan, names: Sequence[str], shown: int) -> str:
    """Return a summary of a set: samples, sources, and epochs of sources that are read more than once.

    Args:
        plan: the set.
        names: names of its sources.
        shown: sources that are listed by name; the others are counted.
    """
    sources = [
        f"{name} ({epochs:,.1f} epochs)" if epochs > 1 else name
        for name, epochs in zip(names, plan.epochs, strict=True)
    ]
    text = f"{plan.size:,} samples of {', '.join(sources[:shown])}"
    if len(sources) > shown:
        text += f" and {len(sources) - shown} more"
        if (most := max(plan.epochs[shown:])) > 1:
            text += f" (up to {most:,.1f} epochs)"
    return text
