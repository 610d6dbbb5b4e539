"""Dataset construction from a RunConfig: training, validation and test sets with Megatron's sizes and splits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_lite.config.data import DataConfig, DataGroup, DataSource
from megatron_lite.config.run import RunConfig
from megatron_lite.config.tuning import validation_groups
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.loss_mask import has_mask, open_mask
from megatron_lite.data.format.manifest import DatasetManifest, check_manifest
from megatron_lite.data.order.blending import normalize
from megatron_lite.data.order.index_cache import Notices, cached_index
from megatron_lite.data.order.megatron_cache import find_megatron_index
from megatron_lite.data.order.sample_index import plan_index
from megatron_lite.data.order.set_plan import SetPlan, SourcePlan
from megatron_lite.data.order.split import Order, range_bounds, split_bounds
from megatron_lite.data.serving.answers import AnswerDataset
from megatron_lite.data.serving.checks import check_control_codes, check_vocabulary, cut_answers, repeated_samples
from megatron_lite.data.serving.closed_form import ClosedFormDataset, samples_per_epoch
from megatron_lite.data.serving.dataset import (
    BlendedDataset,
    ConcatDataset,
    Dataset,
    GPTDataset,
    MockDataset,
)
from megatron_lite.data.serving.epochs import source_samples
from megatron_lite.data.serving.slices import SliceDataset
from megatron_lite.errors import DataError
from megatron_lite.schedules.data_order import DataSegment, extend_history
from megatron_lite.schedules.length import test_samples

SURPLUS = 1.005
"""Factor on the samples that a blend requests of each source, the same in both generations."""

SPLITS = ("train", "valid", "test")

Requests = Sequence[int]
"""Samples requested when the run began and at each later extension of the run, increasing."""

SHORTEN = {
    "train": "Give a smaller --train-iters or --train-samples (a run can be made longer later)",
    "valid": "Give a smaller --eval-iters or a larger --eval-interval",
    "test": "Give a smaller --eval-iters",
}
"""Fix of an error about a sample index that is too large, by split."""


@dataclass(frozen=True)
class Datasets:
    """Datasets of a run; sets without documents or without requested samples are left out.

    Attributes:
        train: the training data; None for a run that only evaluates.
        valid: validation sets by name.
        test: test sets by name.
        plans: plan of each dataset, by split and name.
        notices: warnings and details of opening and indexing the datasets.
    """

    train: Dataset | None
    valid: dict[str, Dataset]
    test: dict[str, Dataset]
    plans: dict[str, dict[str, SetPlan]]
    notices: Notices = field(default_factory=Notices)


def build_datasets(
    config: RunConfig, order: DataSegment | None = None, *, vocab_size: int = 0, tokenizer_fingerprint: str = ""
) -> Datasets:
    """Open the run's datasets and read or build their sample indices.

    Args:
        config: the run.
        order: samples that the run has requested of its datasets so far; None: the run begins.
        vocab_size: upper bound of token ids; 0: the model's vocabulary size, or no check if that is 0 too.
        tokenizer_fingerprint: fingerprint that the datasets' manifests must have; "": not compared.

    Raises:
        DataError: a dataset is missing, damaged, too small, or made with another tokenizer; or an index does not fit
            in memory or on the disk.
        ConfigError: --split cannot be parsed.
    """
    builder = _Builder(config, vocab_size or config.model.vocab_size, tokenizer_fingerprint)
    plans = builder.plan(order or extend_history((), config)[-1])
    built = {split: {name: builder.build(plan) for name, plan in sets.items()} for split, sets in plans.items()}
    train = next(iter(built["train"].values()), None)
    return Datasets(train, built["valid"], built["test"], plans, builder.notices)


def plan_datasets(config: RunConfig, order: DataSegment | None = None) -> dict[str, dict[str, SetPlan]]:
    """Open the run's datasets and return their plans by split and name, without building an index.

    Raises:
        DataError: a dataset is missing, damaged or too small.
    """
    return _Builder(config, 0, "").plan(order or extend_history((), config)[-1])


class _Builder:
    """State shared by the sets of a run while they are built: opened files and notices."""

    def __init__(self, config: RunConfig, vocab_size: int, fingerprint: str) -> None:
        self.config = config
        # The closed-form order rounds splits and blends as Megatron-LM does.
        self.generation: Order = "legacy" if config.data.index_order == "legacy" else "modern"
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.opened: dict[str, IndexedDataset] = {}
        self.masks: dict[str, IndexedDataset] = {}
        self.notices = Notices()

    def plan(self, order: DataSegment) -> dict[str, dict[str, SetPlan]]:
        """Plan all sets before the first index is built, so that errors appear before time is spent."""
        config, data = self.config, self.config.data
        check_control_codes(config)
        requests = {
            "train": () if config.training.skip_train else order.train_requests,
            "valid": order.valid_requests if config.training.eval_iters else (),
            "test": (test_samples(config),) if config.training.eval_iters else (),
        }
        groups = dict(zip(SPLITS, (data.train_groups, validation_groups(config), data.test_groups), strict=True))
        found: dict[str, dict[str, SetPlan]] = {}
        for number, split in enumerate(SPLITS):
            asked, sets = requests[split], list[SetPlan]()
            if asked and data.mock:
                sets.append(SetPlan(split, split, asked[-1]))
            elif asked and data.sources and split == "valid" and config.tuning.control_codes:
                for code, source in zip(config.tuning.control_codes, data.sources, strict=True):
                    sets += self.from_split(number, asked, [replace(source, weight=None)], code)
            elif asked and data.sources:
                sets += self.from_split(number, asked, data.sources, split)
            sets += [self.from_group(group, split, asked) for group in groups[split] if asked]
            found[split] = {plan.name: plan for plan in sets}
            if split != "train":
                self.notices.warnings += [text for plan in sets if (text := repeated_samples(config, plan))]
        if requests["train"] and not found["train"]:
            if data.sources:
                raise DataError(
                    f"There are no documents to train on: the first share of --split {data.split} is 0",
                    fix="Give --split a first share above 0, for example --split 949,50,1, or --skip-train",
                )
            raise DataError(
                "There are no documents to train on: no training dataset is given",
                fix="Give --data-path PREFIX, --train-data-path PREFIX or --mock-data",
            )
        return found

    def open(self, prefix: str) -> IndexedDataset:
        """Open a file once, and check that its tokens match the tokenizer."""
        if prefix not in self.opened:
            data = IndexedDataset(prefix)
            manifest = check_manifest(prefix, self.fingerprint)
            length = manifest.packed_length if manifest is not None else 0
            if length and length != self.config.batch.seq_length:
                self.notices.warnings.append(
                    f"{prefix} is packed in sequences of {length} tokens, --seq-length is "
                    f"{self.config.batch.seq_length}: samples begin and end inside documents"
                )
            if length and not (self.config.data.eod_mask_loss or self.config.tuning.answer_loss):
                self.notices.warnings.append(f"{prefix} is packed: without --eod-mask-loss, its padding is trained on")
            check_vocabulary(data, self.vocab_size)
            self.opened[prefix] = data
            self.open_mask(data, manifest)
        return self.opened[prefix]

    def open_mask(self, data: IndexedDataset, manifest: DatasetManifest | None) -> None:
        """Open the loss mask of a file under --answer-loss, and count the answers that --seq-length cuts."""
        if not self.config.tuning.answer_loss:
            if has_mask(data.prefix):
                self.notices.warnings.append(
                    f"{data.prefix} marks its answers, and without --answer-loss prompts are trained on, too"
                )
            return
        self.masks[data.prefix] = open_mask(data)
        if warning := cut_answers(data, manifest, self.config.batch.seq_length):
            self.notices.warnings.append(warning)

    def from_split(
        self, number: int, requests: Requests, sources: Sequence[DataSource], set_name: str
    ) -> list[SetPlan]:
        """Plan set `number` of datasets and --split; an empty list if the split assigns no documents to it."""
        data, name = self.config.data, SPLITS[number]
        parts = []
        for source in sources:
            opened = self.open(source.path)
            bounds = split_bounds(data.split, len(opened), self.generation)
            parts.append(SourcePlan(source, opened, (bounds[number], bounds[number + 1])))
        if all(part.bounds[0] >= part.bounds[1] for part in parts if part.source.weight != 0):
            if set_name != name:
                raise DataError(
                    f"The control code {set_name} has no validation set: --split {data.split} assigns no document of "
                    f"{sources[0].path} to validation",
                    fix="Give --split a larger second share, for example 90,10,0, or validation datasets of their own: "
                    "--train-data-path and --valid-data-path",
                )
            if number:
                self.notices.warnings.append(f"--split {data.split} assigns no documents to {name}: the set is empty")
            return []
        blended = len(parts) > 1 or parts[0].source.weight is not None
        plan = SetPlan(name, set_name, requests[-1], tuple(parts), (), name, name)
        return [self.cover(plan, requests, blended=blended)]

    def from_group(self, group: DataGroup, split: str, requests: Requests) -> SetPlan:
        """Plan a group of a weighted split: a named set of ranges of files."""
        parts = []
        for source in group.sources:
            opened = self.open(source.path)
            parts.append(SourcePlan(source, opened, range_bounds(source.start, source.end, len(opened))))
        # Names in the caches of Megatron-LM are those of the split, in the caches of Megatron-DeepSpeed the group's.
        name = split if self.generation == "modern" else group.name
        plan = SetPlan(split, group.name, requests[-1], tuple(parts), (), name, "")
        return self.cover(plan, requests, blended=len(parts) > 1)

    def cover(self, plan: SetPlan, requests: Requests, *, blended: bool) -> SetPlan:
        """Add the index plans for the requests: a single file, a weighted blend, or one epoch of each file.

        A blend leaves out sources of weight 0 and sources without documents in this set; the remaining weights are
        normalized.
        """
        if not blended:
            return replace(plan, sources=(self.index(plan.sources[0], plan.name, requests),))
        parts: Sequence[SourcePlan] = [part for part in plan.sources if part.bounds[0] < part.bounds[1]]
        for part in plan.sources if parts else ():
            if part.bounds[0] >= part.bounds[1] and part.source.weight != 0:
                self.notices.warnings.append(
                    f"the dataset {part.data.prefix} ({len(part.data):,} sequences) is too small to give the "
                    f"{plan.name} set a "
                    "document: the other datasets of the set take its share"
                )
        parts = parts or plan.sources
        given = [part.source.weight for part in parts]
        if any(weight is None for weight in given):
            epochs = self.config.epoch_samples if plan.split == "train" else 0
            sources = tuple(
                self.index(part, plan.name, self.epochs_of(part, requests) if epochs else None)
                for part in parts
                if part.source.weight != 0
            )
            sizes = [part.asked or part.size for part in sources]
            if plan.split == "train" and plan.size > sum(sizes):
                raise DataError(
                    f"The datasets of the {plan.name} set hold {sum(sizes):,} samples, and the run needs {plan.size:,}",
                    rule="Several datasets without weights are read once; with weights they are repeated as needed",
                    fix="Write a weight before each path, for example --data-path 0.3 a 0.7 b, train for fewer "
                    "iterations, or give --epochs N instead of --train-iters",
                )
            # Validation and test restart at the end of their data.
            size = min(plan.size, sum(sizes))
            return replace(plan, size=size, sources=sources, shares=tuple(normalize(sizes)))
        weights = [weight for weight in given if weight is not None]
        modern = self.generation == "modern"
        shares, _ = blend_counts(weights, 1, modern=modern)
        counts = zip(*(blend_counts(weights, request, modern=modern)[1] for request in requests), strict=True)
        asked = [(part, count) for part, count in zip(parts, counts, strict=True) if part.source.weight]
        sources = tuple(self.index(part, plan.name, count) for part, count in asked)
        # Normalized with the zeros included: numpy's order of summation depends on the number of elements.
        return replace(plan, sources=sources, shares=tuple(share for share in normalize(shares) if share > 0))

    def epochs_of(self, part: SourcePlan, requests: Requests) -> Requests:
        """Return the samples of one source in each request of a blend of whole epochs."""
        one, total = source_samples(self.config, part.data, part.bounds), self.config.epoch_samples
        return [-(-request * one // total) for request in requests]

    def index(self, part: SourcePlan, name: str, requests: Requests | None) -> SourcePlan:
        """Plan the indices of one source.

        Args:
            part: the source.
            name: name of the set, for the error message.
            requests: samples requested of the source, increasing; None: one epoch.
        """
        config, (first, last), prefix = self.config, part.bounds, part.data.prefix
        if first >= last:
            raise DataError(
                f'The set "{name}" gets nothing of the dataset {prefix}: its share '
                f"{part.source.start:g}:{part.source.end:g} of {len(part.data):,} sequences rounds to none",
                fix="Give it a larger share START:END of this dataset, use a larger dataset, or leave the dataset out "
                "of the set",
            )
        part = replace(part, asked=requests[-1] if requests else None)
        if config.data.sampling == "slice":
            return replace(part, epoch_samples=float(np.count_nonzero(part.data.sizes[first:last])))
        if config.data.index_order == "closed-form":
            with _of_set(name):
                samples = samples_per_epoch(part.data, part.bounds, config.batch.seq_length)
            return replace(part, epoch_samples=float(samples))
        seed = config.runtime.seed
        with _of_set(name):
            first_index = plan_index(
                part.data.sizes,
                part.bounds,
                num_samples=requests[0] if requests else None,
                seq_length=config.batch.seq_length,
                seed=seed,
                order=self.generation,
                prefix=prefix,
            )
        indices, covered = [first_index], first_index.total_samples
        for request in requests[1:] if requests else ():
            if request > covered:
                # With another seed, so that the order of the first index is not repeated.
                more = replace(first_index, num_samples=request - covered, seed=(seed + len(indices)) % 2**32)
                indices.append(more)
                covered += more.total_samples
        return replace(
            part, indices=tuple(indices), epoch_samples=first_index.tokens_per_epoch / config.batch.seq_length
        )

    def build(self, plan: SetPlan) -> Dataset:
        """Build the dataset of a plan."""
        config = self.config
        if not plan.sources:
            seed = config.runtime.seed * len(SPLITS) + SPLITS.index(plan.split)
            return MockDataset(plan.size, config.batch.seq_length, max(1, self.vocab_size), seed)
        datasets = [self.single(plan, part) for part in plan.sources]
        dataset = BlendedDataset(datasets, plan.shares, plan.size) if plan.shares else datasets[0]
        return AnswerDataset(dataset, self.masks) if config.tuning.answer_loss else dataset

    def single(self, plan: SetPlan, part: SourcePlan) -> Dataset:
        """Build the dataset of one source, with its indices from a cache where there is one."""
        config, data = self.config, part.data
        if not part.indices:
            kind = SliceDataset if config.data.sampling == "slice" else ClosedFormDataset
            with _of_set(plan.name):
                return kind(
                    data, part.bounds, part.asked, config.batch.seq_length, config.runtime.seed, self.vocab_size
                )
        folder, datasets = cache_folder(config.data), list[Dataset]()
        for wanted in part.indices:
            index = find_megatron_index(
                data.prefix, plan.cache_name, plan.cache_split, folder, wanted, data.sizes, self.notices
            ) or cached_index(wanted, data, folder, self.notices, SHORTEN[plan.split])
            datasets.append(GPTDataset(data, index, self.vocab_size))
        return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


@contextmanager
def _of_set(name: str) -> Iterator[None]:
    """Name the set in an error about one of its sources."""
    try:
        yield
    except DataError as error:
        raise DataError(f"Set {name}: {error.problem}", rule=error.rule, fix=error.fix) from error


def cache_folder(data: DataConfig) -> Path | None:
    """Return --data-cache-path as a path; None: beside each dataset."""
    return Path(data.cache_path) if data.cache_path else None


def blend_counts(weights: Sequence[float], wanted: int, *, modern: bool) -> tuple[list[float], list[int]]:
    """Return the normalized weights, and the samples that are requested of each source.

    The generations sum the weights in different orders, which can change the last bit; the blend normalizes again.
    """
    if not math.isfinite(sum(weights)) or min(weights) < 0 or sum(weights) <= 0:
        raise DataError(
            f"Cannot blend datasets with the weights {list(weights)}",
            fix="Give weights of at least 0, not all 0, for example --data-path 0.3 a 0.7 b",
        )
    if modern:
        shares = normalize(weights)
        return shares, [math.ceil(math.ceil(wanted * share) * SURPLUS) for share in shares]
    total = 0.0
    for weight in weights:
        total += weight
    shares = [weight / total for weight in weights]
    return shares, [math.ceil(wanted * share * SURPLUS) for share in shares]
