"""From the configuration to the datasets of training, validation and test, with Megatron's counts and splits."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.config.data import DataConfig, DataGroup, DataSource
from megatron_lite.config.run import RunConfig
from megatron_lite.data.blending import normalize
from megatron_lite.data.dataset import BlendedDataset, Dataset, GPTDataset, MockDataset, check_tokens
from megatron_lite.data.index_cache import cached_index
from megatron_lite.data.indexed_dataset import IndexedDataset
from megatron_lite.data.megatron_cache import find_megatron_index
from megatron_lite.data.preprocess.manifest import Manifest, check_files, read_manifest
from megatron_lite.data.sample_index import plan_index
from megatron_lite.data.slices import SliceDataset
from megatron_lite.data.split import range_bounds, split_bounds
from megatron_lite.errors import DataError
from megatron_lite.schedules.length import test_samples, train_samples, valid_samples

LOG = logging.getLogger(__name__)

SURPLUS = 1.005
"""A blend asks each source for half a percent more samples than its share, as both generations do."""

SPLITS = ("train", "valid", "test")

PROBES = 64
PROBED = 1 << 14
"""Places of a file, and tokens at each, whose ids are checked when it is opened; every sample is checked when read."""


@dataclass(frozen=True)
class Datasets:
    """What a run reads. A set that has no documents, or of which no samples are wanted, is not there."""

    train: Dataset | None
    valid: dict[str, Dataset]
    test: dict[str, Dataset]


def build_datasets(config: RunConfig, *, vocab_size: int = 0, tokenizer_fingerprint: str = "") -> Datasets:
    """Open the run's datasets and build or find their indices.

    Args:
        config: the run.
        vocab_size: entries of the tokenizer, above which no id may be; 0: the model's, or no check without one.
        tokenizer_fingerprint: what a dataset's manifest must name; "": not compared.

    Raises:
        DataError: a dataset is missing, damaged, too small, or made with another tokenizer.
        ConfigError: --split cannot be read.
    """
    builder = _Builder(config, vocab_size or config.model.vocab_size, tokenizer_fingerprint)
    wanted = dict(zip(SPLITS, (train_samples(config), valid_samples(config), test_samples(config)), strict=True))
    data = config.data
    groups = dict(zip(SPLITS, (data.train_groups, data.valid_groups, data.test_groups), strict=True))
    found: dict[str, dict[str, Dataset]] = {}
    for number, name in enumerate(SPLITS):
        found[name] = {}
        if wanted[name] <= 0:
            continue
        if data.mock:
            found[name][name] = builder.mock(number, wanted[name])
        elif data.sources:
            found[name].update(builder.from_split(number, wanted[name]))
        for group in groups[name]:
            found[name].update(builder.from_group(group, name, wanted[name]))
    if wanted["train"] and not found["train"]:
        raise DataError(
            "Training needs documents",
            found=f"--split {data.split!r} gives none to training" if data.sources else "no dataset is given",
            fix="Give --data-path (or --mock-data) and a --split whose first share is not 0",
        )
    return Datasets(next(iter(found["train"].values()), None), found["valid"], found["test"])


@dataclass(frozen=True)
class _Part:
    """One source of a set: an opened file, its range of sequences, and its weight in the blend."""

    source: DataSource
    data: IndexedDataset
    bounds: tuple[int, int]


class _Builder:
    """What building the sets has in common."""

    def __init__(self, config: RunConfig, vocab_size: int, fingerprint: str) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.opened: dict[str, IndexedDataset] = {}

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

    def mock(self, number: int, wanted: int) -> Dataset:
        """The made-up set of a split."""
        seed = self.config.runtime.seed * len(SPLITS) + number
        return MockDataset(wanted, self.config.batch.seq_length, max(1, self.vocab_size), seed)

    def from_split(self, number: int, wanted: int) -> dict[str, Dataset]:
        """Set `number` of the files that --split cuts; empty if it gives them no documents."""
        data, name = self.config.data, SPLITS[number]
        parts = []
        for source in data.sources:
            opened = self.open(source.path)
            bounds = split_bounds(data.split, len(opened), data.index_order)
            parts.append(_Part(source, opened, (bounds[number], bounds[number + 1])))
        if all(low >= high for low, high in (part.bounds for part in parts)):
            if number:
                LOG.warning("--split %s gives no documents to %s: there will be none", data.split, name)
            return {}
        blended = len(parts) > 1 or parts[0].source.weight is not None
        return {name: self.blend(parts, name, name, wanted) if blended else self.single(parts[0], name, name, wanted)}

    def from_group(self, group: DataGroup, split: str, wanted: int) -> dict[str, Dataset]:
        """A named set of ranges of files."""
        parts = []
        for source in group.sources:
            opened = self.open(source.path)
            parts.append(_Part(source, opened, range_bounds(source.start, source.end, len(opened))))
        # Megatron-LM's caches are named after the split, Megatron-DeepSpeed's after the group.
        name = split if self.config.data.index_order == "modern" else group.name
        if len(parts) == 1:
            return {group.name: self.single(parts[0], name, "", wanted)}
        return {group.name: self.blend(parts, name, "", wanted)}

    def blend(self, parts: Sequence[_Part], name: str, split: str, wanted: int) -> Dataset:
        """Several files by weight, or each for one epoch where no weights are given."""
        given = [part.source.weight for part in parts]
        if any(weight is None for weight in given):
            datasets = [self.single(part, name, split, None) for part in parts]
            sizes = [len(dataset) for dataset in datasets]
            if wanted > sum(sizes):
                raise DataError(
                    "Datasets without weights are read once",
                    found=f"they hold {sum(sizes)} samples, {name} needs {wanted}",
                    fix="Give each path of --data-path a weight before it, or train for less",
                )
            return BlendedDataset(datasets, normalize(sizes), wanted)
        weights = [weight for weight in given if weight is not None]
        shares, counts = blend_counts(weights, wanted, modern=self.config.data.index_order == "modern")
        datasets = [self.single(part, name, split, count) for part, count in zip(parts, counts, strict=True)]
        return BlendedDataset(datasets, normalize(shares), wanted)

    def single(self, part: _Part, name: str, split: str, wanted: int | None) -> Dataset:
        """One file's range of sequences, for `wanted` samples or one epoch."""
        config, (first, last) = self.config, part.bounds
        if first >= last:
            raise DataError(
                "Every source of a set has documents in it",
                found=f"{name} takes sequences {first} to {last} of {part.data.prefix}",
                fix="Change --split or the source's START:END, or leave the source out of the blend",
            )
        length, seed = config.batch.seq_length, config.runtime.seed
        if config.data.sampling == "slice":
            return SliceDataset(part.data, part.bounds, wanted, length, seed, self.vocab_size)
        plan = plan_index(
            part.data.sizes,
            part.bounds,
            num_samples=wanted,
            seq_length=length,
            seed=seed,
            order=config.data.index_order,
            prefix=part.data.prefix,
        )
        folder = cache_folder(config.data)
        index = find_megatron_index(part.data.prefix, name, split, folder, plan, part.data.sizes)
        return GPTDataset(part.data, index or cached_index(plan, part.data, folder), self.vocab_size)


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
