"""Dataset plans: files, document ranges and sample indices of each split, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lite.config.data import DataSource
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.sample_index import IndexPlan


@dataclass(frozen=True)
class SourcePlan:
    """One source of a set: an opened file, its range of sequences, and the sample indices that cover the requests.

    Attributes:
        source: as the config has it.
        data: the file.
        bounds: sequences [first, last) of it.
        indices: one for what the run asked when it began, and one for what each longer run needed beyond; none where
            the order needs no index (--document-sampling slice).
        asked: samples asked of it in all; None: one epoch.
        epoch_samples: samples of one epoch; with an index, the last may end in the next epoch.
    """

    source: DataSource
    data: IndexedDataset
    bounds: tuple[int, int]
    indices: tuple[IndexPlan, ...] = ()
    asked: int | None = None
    epoch_samples: float = 0.0

    @property
    def size(self) -> int:
        """Samples of one epoch that end in it."""
        return self.indices[0].total_samples if self.indices else int(self.epoch_samples)


@dataclass(frozen=True)
class SetPlan:
    """A set of a split (several validation groups are several sets), before anything is built for it.

    Attributes:
        split: train, valid or test.
        name: the set's; the split's, or that of its group.
        size: samples asked of it.
        sources: in the order of the blend; none for made-up data.
        shares: of the sources in the blend, summing to 1; empty for a single source that is no blend.
        cache_name: what Megatron's index caches call the set.
        cache_split: the --split that they depend on.
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
        """Indices of all sources."""
        return tuple(index for source in self.sources for index in source.indices)

    @property
    def epochs(self) -> tuple[float, ...]:
        """How often each source is read by `size` samples; 0 for made-up data."""
        shares = self.shares or (1.0,)
        if not self.sources:
            return (0.0,)
        return tuple(
            self.size * share / max(1.0, source.epoch_samples)
            for share, source in zip(shares, self.sources, strict=True)
        )


def describe_set(plan: SetPlan, names: Sequence[str], shown: int) -> str:
    """Return how many samples of which sources a set has, and how often a source is read, where it is more than once.

    Args:
        plan: the set.
        names: of its sources.
        shown: sources that are named; of the rest only their number is told.
    """
    texts = [
        name + (f" ({epochs:,.1f} epochs)" if epochs > 1 else "")
        for name, epochs in zip(names, plan.epochs, strict=True)
    ]
    hidden = plan.epochs[shown:]
    more = f" and {len(hidden)} more" if hidden else ""
    if hidden and max(hidden) > 1:
        more += f" (up to {max(hidden):,.1f} epochs)"
    return f"{plan.size:,} samples of {', '.join(texts[:shown])}{more}"
