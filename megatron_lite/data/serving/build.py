"""Dataset construction from the config: training, validation and test sets with Megatron's sizes and splits."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_lite.config.data import DataConfig, DataGroup
from megatron_lite.config.run import RunConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.manifest import Manifest, check_files, read_manifest
from megatron_lite.data.order.blending import normalize
from megatron_lite.data.order.index_cache import cached_index
from megatron_lite.data.order.megatron_cache import find_megatron_index
from megatron_lite.data.order.sample_index import plan_index
from megatron_lite.data.order.set_plan import SetPlan, SourcePlan
from megatron_lite.data.order.split import range_bounds, split_bounds
from megatron_lite.data.serving.dataset import (
    BlendedDataset,
    ConcatDataset,
    Dataset,
    GPTDataset,
    MockDataset,
    check_tokens,
)
from megatron_lite.data.serving.slices import SliceDataset
from megatron_lite.errors import DataError
from megatron_lite.schedules.data_order import DataSegment, extend_history
from megatron_lite.schedules.length import test_samples

LOG = logging.getLogger(__name__)

SURPLUS = 1.005
"""A blend asks each source for half a percent more samples than its share, as both generations do."""

SPLITS = ("train", "valid", "test")

Requests = Sequence[int]
"""Samples that a run asked for when it began and each time that it was made longer, rising."""

SHORTEN = {
    "train": "Give a smaller --train-iters or --train-samples (a run can be made longer later)",
    "valid": "Give a smaller --eval-iters or a larger --eval-interval",
    "test": "Give a smaller --eval-iters",
}
"""What makes the index of a split smaller."""

PROBES = 64
PROBED = 1 << 14
"""Places of a file, and tokens at each, whose ids are checked when it is opened; every sample is checked when read."""


@dataclass(frozen=True)
class Datasets:
    """What a run reads. A set that has no documents, or of which no samples are wanted, is not there.

    Attributes:
        train: the training data; None for a run that only evaluates.
        valid: validation sets by name.
        test: test sets by name.
        plans: what each dataset was built from, by split and name.
    """

    train: Dataset | None
    valid: dict[str, Dataset]
    test: dict[str, Dataset]
    plans: dict[str, dict[str, SetPlan]]


def build_datasets(
    config: RunConfig, order: DataSegment | None = None, *, vocab_size: int = 0, tokenizer_fingerprint: str = ""
) -> Datasets:
    """Open the run's datasets and build or find their indices.

    Args:
        config: the run.
        order: what the run's datasets were asked for so far; None: it begins.
        vocab_size: entries of the tokenizer, above which no id may be; 0: the model's, or no check without one.
        tokenizer_fingerprint: what a dataset's manifest must name; "": not compared.

    Raises:
        DataError: a dataset is missing, damaged, too small, or made with another tokenizer; or an index does not fit.
        ConfigError: --split cannot be read.
    """
    builder = _Builder(config, vocab_size or config.model.vocab_size, tokenizer_fingerprint)
    plans = builder.plan(order or extend_history((), config)[-1])
    built = {split: {name: builder.build(plan) for name, plan in sets.items()} for split, sets in plans.items()}
    return Datasets(next(iter(built["train"].values()), None), built["valid"], built["test"], plans)


def plan_datasets(config: RunConfig, order: DataSegment | None = None) -> dict[str, dict[str, SetPlan]]:
    """Open the run's datasets and return what would be built for them, by split and name.

    Raises:
        DataError: a dataset is missing, damaged or too small.
    """
    return _Builder(config, 0, "").plan(order or extend_history((), config)[-1])


class _Builder:
    """What building the sets has in common."""

    def __init__(self, config: RunConfig, vocab_size: int, fingerprint: str) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.opened: dict[str, IndexedDataset] = {}

    def plan(self, order: DataSegment) -> dict[str, dict[str, SetPlan]]:
        """Plan all sets, before the first index is built: what is wrong with one shows before time is spent."""
        config, data = self.config, self.config.data
        requests = {
            "train": () if config.training.skip_train else order.train_requests,
            "valid": order.valid_requests if config.training.eval_iters else (),
            "test": (test_samples(config),) if config.training.eval_iters else (),
        }
        groups = dict(zip(SPLITS, (data.train_groups, data.valid_groups, data.test_groups), strict=True))
        found: dict[str, dict[str, SetPlan]] = {}
        for number, split in enumerate(SPLITS):
            asked, sets = requests[split], list[SetPlan]()
            if asked and data.mock:
                sets.append(SetPlan(split, split, asked[-1]))
            elif asked and data.sources:
                sets += self.from_split(number, asked)
            sets += [self.from_group(group, split, asked) for group in groups[split] if asked]
            found[split] = {plan.name: plan for plan in sets}
        if requests["train"] and not found["train"]:
            raise DataError(
                "Training needs documents",
                found=f"--split {data.split!r} gives none to training" if data.sources else "no dataset is given",
                fix="Give --data-path (or --mock-data) and a --split whose first share is not 0",
            )
        return found

    def open(self, prefix: str) -> IndexedDataset:
        """Open a file once, and check that it is this tokenizer's."""
        if prefix not in self.opened:
            data = IndexedDataset(prefix)
            manifest = check_manifest(prefix, self.fingerprint)
            if manifest is not None and manifest.packed_length:
                warn_of_packing(prefix, manifest.packed_length, self.config)
            check_vocabulary(data, self.vocab_size)
            self.opened[prefix] = data
        return self.opened[prefix]

    def from_split(self, number: int, requests: Requests) -> list[SetPlan]:
        """Plan set `number` of the files that --split cuts; none if it gives them no documents."""
        data, name = self.config.data, SPLITS[number]
        parts = []
        for source in data.sources:
            opened = self.open(source.path)
            bounds = split_bounds(data.split, len(opened), data.index_order)
            parts.append(SourcePlan(source, opened, (bounds[number], bounds[number + 1])))
        if all(part.bounds[0] >= part.bounds[1] for part in parts if part.source.weight != 0):
            if number:
                LOG.warning("--split %s gives no documents to %s: there will be none", data.split, name)
            return []
        blended = len(parts) > 1 or parts[0].source.weight is not None
        plan = SetPlan(name, name, requests[-1], tuple(parts), (), name, name)
        return [self.cover(plan, requests, blended=blended)]

    def from_group(self, group: DataGroup, split: str, requests: Requests) -> SetPlan:
        """Plan a named set of ranges of files."""
        parts = []
        for source in group.sources:
            opened = self.open(source.path)
            parts.append(SourcePlan(source, opened, range_bounds(source.start, source.end, len(opened))))
        # Megatron-LM's caches are named after the split, Megatron-DeepSpeed's after the group.
        name = split if self.config.data.index_order == "modern" else group.name
        plan = SetPlan(split, group.name, requests[-1], tuple(parts), (), name, "")
        return self.cover(plan, requests, blended=len(parts) > 1)

    def cover(self, plan: SetPlan, requests: Requests, *, blended: bool) -> SetPlan:
        """Add the indices for the requests: of one file, of several by weight, or of each one epoch without weights.

        A blend leaves out sources of weight 0, and those without documents in this set, whose share the others take.
        """
        if not blended:
            return replace(plan, sources=(self.index(plan.sources[0], plan.name, requests),))
        parts = _with_documents(plan.sources, plan.name)
        given = [part.source.weight for part in parts]
        if any(weight is None for weight in given):
            sources = tuple(self.index(part, plan.name, None) for part in parts if part.source.weight != 0)
            sizes = [part.size for part in sources]
            if plan.split == "train" and plan.size > sum(sizes):
                raise DataError(
                    "Datasets without weights are read once",
                    found=f"they hold {sum(sizes)} samples, {plan.name} needs {plan.size}",
                    fix="Give each path of --data-path a weight before it, or train for less",
                )
            # Validation and test begin anew at the end.
            size = min(plan.size, sum(sizes))
            return replace(plan, size=size, sources=sources, shares=tuple(normalize(sizes)))
        weights = [weight for weight in given if weight is not None]
        modern = self.config.data.index_order == "modern"
        shares, _ = blend_counts(weights, 1, modern=modern)
        counts = zip(*(blend_counts(weights, request, modern=modern)[1] for request in requests), strict=True)
        asked = [(part, count) for part, count in zip(parts, counts, strict=True) if part.source.weight]
        sources = tuple(self.index(part, plan.name, count) for part, count in asked)
        # Normalized with the zeros in place: numpy sums eight or more numbers in an order that depends on their places.
        return replace(plan, sources=sources, shares=tuple(share for share in normalize(shares) if share > 0))

    def index(self, part: SourcePlan, name: str, requests: Requests | None) -> SourcePlan:
        """Plan the indices of one source.

        Args:
            part: the source.
            name: of the set, for the error.
            requests: samples asked of the source, rising; None: one epoch.
        """
        config, (first, last), prefix = self.config, part.bounds, part.data.prefix
        if first >= last:
            raise DataError(
                "Every source of a set has documents in it",
                found=f"{name} takes sequences {first} to {last} of {prefix}",
                fix="Change --split or the source's START:END, or leave the source out of the blend",
            )
        part = replace(part, asked=requests[-1] if requests else None)
        if config.data.sampling == "slice":
            return replace(part, epoch_samples=float(np.count_nonzero(part.data.sizes[first:last])))
        seed = config.runtime.seed
        first_index = plan_index(
            part.data.sizes,
            part.bounds,
            num_samples=requests[0] if requests else None,
            seq_length=config.batch.seq_length,
            seed=seed,
            order=config.data.index_order,
            prefix=prefix,
        )
        indices, covered = [first_index], first_index.total_samples
        for request in requests[1:] if requests else ():
            if request > covered:
                # Of another seed, so that it is not the first one's order again.
                more = replace(first_index, num_samples=request - covered, seed=(seed + len(indices)) % 2**32)
                indices.append(more)
                covered += more.total_samples
        return replace(
            part, indices=tuple(indices), epoch_samples=first_index.tokens_per_epoch / config.batch.seq_length
        )

    def build(self, plan: SetPlan) -> Dataset:
        """Build or find what a plan names."""
        config = self.config
        if not plan.sources:
            seed = config.runtime.seed * len(SPLITS) + SPLITS.index(plan.split)
            return MockDataset(plan.size, config.batch.seq_length, max(1, self.vocab_size), seed)
        datasets = [self.single(plan, part) for part in plan.sources]
        return BlendedDataset(datasets, plan.shares, plan.size) if plan.shares else datasets[0]

    def single(self, plan: SetPlan, part: SourcePlan) -> Dataset:
        """Build or find the indices of one source."""
        config, data = self.config, part.data
        if not part.indices:
            length, seed = config.batch.seq_length, config.runtime.seed
            return SliceDataset(data, part.bounds, part.asked, length, seed, self.vocab_size)
        folder, datasets = cache_folder(config.data), list[Dataset]()
        for wanted in part.indices:
            index = find_megatron_index(
                data.prefix, plan.cache_name, plan.cache_split, folder, wanted, data.sizes
            ) or cached_index(wanted, data, folder, SHORTEN[plan.split])
            datasets.append(GPTDataset(data, index, self.vocab_size))
        return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def _with_documents(parts: Sequence[SourcePlan], name: str) -> Sequence[SourcePlan]:
    """The sources that have documents in a set, with a note on the others; all of them if none has."""
    found = [part for part in parts if part.bounds[0] < part.bounds[1]]
    for part in parts if found else ():
        if part not in found and part.source.weight != 0:
            LOG.warning(
                "%s has no documents for %s (%d sequences in all): left out, the other sources take over its share",
                part.data.prefix,
                name,
                len(part.data),
            )
    return found or parts


def cache_folder(data: DataConfig) -> Path | None:
    """--data-cache-path as a path; None: beside each dataset."""
    return Path(data.cache_path) if data.cache_path else None


def blend_counts(weights: Sequence[float], wanted: int, *, modern: bool) -> tuple[list[float], list[int]]:
    """Normalised weights, and the samples that each source is asked for.

    The generations sum the weights in different orders, which can change the last bit; the blend divides once more.
    """
    if not math.isfinite(sum(weights)) or min(weights) < 0 or sum(weights) <= 0:
        raise DataError(
            "Weights of a blend are not negative and not all zero",
            found=f"{list(weights)}",
            fix="Change the weights in --data-path",
        )
    if modern:
        shares = normalize(weights)
        return shares, [math.ceil(math.ceil(wanted * share) * SURPLUS) for share in shares]
    total = 0.0
    for weight in weights:
        total += weight
    shares = [weight / total for weight in weights]
    return shares, [math.ceil(wanted * share * SURPLUS) for share in shares]


def check_manifest(prefix: str, fingerprint: str) -> Manifest | None:
    """Compare a dataset with its manifest, if preprocessing left one: its files' sizes and its tokenizer.

    Returns:
        The manifest; None if there is none.

    Raises:
        DataError: they differ.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return None
    check_files(prefix, manifest, contents=False)
    made_with = str(manifest.tokenizer.get("fingerprint", ""))
    if fingerprint and made_with and made_with != fingerprint:
        raise DataError(
            "A dataset is trained on with the tokenizer that made it",
            found=f"{prefix} was made with {manifest.tokenizer.get('type', 'a tokenizer')} of fingerprint {made_with}, "
            f"the run's has {fingerprint}",
            fix="Give the tokenizer's files that the dataset was made with, or preprocess it again",
        )
    return manifest


def warn_of_packing(prefix: str, length: int, config: RunConfig) -> None:
    """Say what a run should do with a dataset that was packed in sequences of `length` tokens, and does not."""
    if length != config.batch.seq_length:
        LOG.warning(
            "%s is packed in sequences of %d tokens, --seq-length is %d: samples begin and end inside of documents",
            prefix,
            length,
            config.batch.seq_length,
        )
    if not config.data.eod_mask_loss:
        LOG.warning("%s is packed: without --eod-mask-loss, its padding is trained on", prefix)


def check_vocabulary(data: IndexedDataset, vocab_size: int) -> None:
    """Look for ids outside the vocabulary at PROBES places of a file: a wrong tokenizer shows in milliseconds.

    Raises:
        DataError: one was found.
    """
    if not vocab_size or not len(data):
        return
    for sequence in np.unique(np.linspace(0, len(data) - 1, PROBES).astype(np.int64)).tolist():
        size = min(PROBED, int(data.sizes[sequence]))
        check_tokens(data.prefix, data.get(sequence, 0, size), vocab_size, f"sequence {sequence}")
