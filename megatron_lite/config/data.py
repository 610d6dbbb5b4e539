"""Data config: dataset paths, blend, split and sample order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.flag import FIELD, Flag, Format, option
from megatron_lite.config.values import read_float, write_value
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

MAX_PREFETCHED = 1000
BY_SIZE = "auto"
"""Stands for a weight in a group whose sources are weighted by their size."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One .bin/.idx pair of a blend: `path` is the common prefix of both files."""

    path: str
    weight: float | None = None
    """Share of the blend; None for every source of a blend: by size."""
    start: float = 0.0
    end: float = 1.0
    """Range of the file's documents, as shares of their number (weighted splits only)."""


@dataclass(frozen=True, kw_only=True)
class DataGroup:
    """A named blend of sources: `train`, or one of several validation sets."""

    name: str
    sources: tuple[DataSource, ...]


def read_split(args: Sequence[str]) -> str:
    """Read shares as 949,50,1, "969, 30, 1" or 949/50/1; return them comma-separated."""
    shares = re.split(r"\s*[,/]\s*|\s+", " ".join(args).strip())
    try:
        numbers = [read_float(share) for share in shares]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0:
        raise ValueError("one to three numbers of at least 0")
    if not any(numbers):
        raise ValueError("numbers that are not all 0")
    return ",".join(shares)


def read_sources(args: Sequence[str]) -> tuple[DataSource, ...]:
    """Read a path, several paths, or weights and paths in turn, distinguished by Megatron's rule."""
    if len(args) % 2 == 0:
        try:
            weights = [read_float(arg) for arg in args[::2]]
        except ValueError:
            weights = []
        if weights:
            return tuple(DataSource(path=path, weight=weight) for weight, path in zip(weights, args[1::2], strict=True))
    return tuple(DataSource(path=path) for path in args)


def write_sources(sources: tuple[DataSource, ...]) -> list[str]:
    """Return the arguments of --data-path."""
    args: list[str] = []
    for source in sources:
        args += [] if source.weight is None else [write_value(source.weight)]
        args.append(source.path)
    return args


def read_groups(args: Sequence[str]) -> tuple[DataGroup, ...]:
    """Read one string a group: "NAME: WEIGHT START:END PATH, WEIGHT START:END PATH".

    Raises:
        ValueError: not in that form, or a range that does not rise.
    """
    return tuple(_read_group(arg) for arg in args)


def _read_group(text: str) -> DataGroup:
    expected = '"NAME: WEIGHT START:END PATH, WEIGHT START:END PATH" with START < END'
    name, colon, rest = text.partition(":")
    sources = []
    for entry in rest.split(","):
        parts = entry.split()
        start, inner, end = parts[1].partition(":") if len(parts) == 3 else ("", "", "")
        if not colon or not inner:
            raise ValueError(expected)
        try:
            weight = None if parts[0] == BY_SIZE else read_float(parts[0])
            source = DataSource(path=parts[2], weight=weight, start=read_float(start), end=read_float(end))
        except ValueError:
            raise ValueError(expected) from None
        if not 0 <= source.start < source.end <= 1:
            raise ValueError(expected)
        sources.append(source)
    return DataGroup(name=name.strip(), sources=tuple(sources))


def read_groups_file(text: str) -> tuple[DataGroup, ...]:
    """Read a --train-weighted-split-paths-path file: one line of groups in double quotes, separated by spaces."""
    line = text.strip()
    if "\n" in line or not (line.startswith('"') and line.endswith('"')):
        raise ValueError('one line of groups in double quotes, for example "en: 1 0:1 data/en" "fr: 1 0:1 data/fr"')
    return read_groups(line[1:-1].split('" "'))


def write_groups(groups: tuple[DataGroup, ...]) -> list[str]:
    """Return the arguments of --train-weighted-split-paths."""
    return [f"{group.name}: {', '.join(_write_source(source) for source in group.sources)}" for group in groups]


def _write_source(source: DataSource) -> str:
    weight = BY_SIZE if source.weight is None else write_value(source.weight)
    return f"{weight} {write_value(source.start)}:{write_value(source.end)} {source.path}"


def _group_flags(split: str) -> tuple[Flag, Flag]:
    """Return the two flags for the data of one split: weighted groups, and a blend as the one group of the split."""

    def read_blend(args: Sequence[str]) -> tuple[DataGroup, ...]:
        return (DataGroup(name=split, sources=read_sources(args)),)

    groups = Flag(
        f"--{split}-weighted-split-paths",
        f'Blend of the {split} data: "NAME: WEIGHT START:END PATH, WEIGHT START:END PATH" (weight auto: by size).',
        format=Format(
            metavar='"GROUP" …',
            example=f"'{split}: 0.3 0:0.9 data/a_text_document, 0.7 0:0.9 data/b_text_document'",
            read=read_groups,
            write=write_groups,
            count="any",
        ),
    )
    blend = Flag(
        f"--{split}-data-path",
        f"Blend of the {split} data, as for --data-path, without a split.",
        format=Format(metavar=BLEND.metavar, example=BLEND.example, read=read_blend),
    )
    return groups, blend


BLEND = Format(
    metavar="[WEIGHT] PATH …",
    example="0.3 data/a_text_document 0.7 data/b_text_document",
    read=read_sources,
    write=write_sources,
    count="any",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets of a run: either `sources` cut by `split`, or groups given per split."""

    sources: tuple[DataSource, ...] = option(
        (), Flag("--data-path", "Prefixes of .bin/.idx pairs, each after its weight or without weights.", format=BLEND)
    )
    split: str = option(
        "969,30,1",
        Flag(
            "--split",
            "Shares of training, validation and test documents.",
            format=Format(metavar="TRAIN,VALID,TEST", example="949,50,1", read=read_split, write=lambda split: [split]),
        ),
    )
    train_groups: tuple[DataGroup, ...] = option((), *_group_flags("train"))
    valid_groups: tuple[DataGroup, ...] = option((), *_group_flags("valid"))
    test_groups: tuple[DataGroup, ...] = option((), *_group_flags("test"))
    mock: bool = option(False, Flag("--mock-data", "Random tokens instead of a dataset.", sets=True))
    index_order: Literal["legacy", "modern", "closed-form"] = option(
        "legacy",
        Flag(
            "--sample-order",
            "Order of the samples: Megatron-DeepSpeed's (legacy) or Megatron-LM's (modern), each with its rounding of "
            "--split, or one that is computed per sample without an index (closed-form).",
            aliases=("--data-index",),
        ),
    )
    sampling: Literal["concatenated", "slice"] = option(
        "concatenated",
        Flag(
            "--document-sampling",
            "Documents concatenated and cut into samples, or one random slice of each document an epoch.",
        ),
    )
    cache_path: str = option(
        "",
        Flag("--data-cache-path", "Folder of the index cache (beside the data if not given)."),
        may_differ="a node may keep its index cache on its own disk; every node builds the same index",
    )
    sampler: Literal["single", "cyclic"] = option(
        "single", Flag("--dataloader-type", "Samples in order, or epoch after epoch in a new order.")
    )
    eod_mask_loss: bool = option(False, Flag("--eod-mask-loss", "No loss at end-of-document tokens.", sets=True))
    reset_position_ids: bool = option(
        False, Flag("--reset-position-ids", "Restart positions after each document.", sets=True)
    )
    reset_attention_mask: bool = option(
        False,
        Flag("--reset-attention-mask", "Document-masked attention; materializes a mask only with ALiBi.", sets=True),
    )
    prefetch: int = option(
        2,
        Flag(
            "--prefetch-microbatches",
            "Micro-batches that a thread reads ahead, all in memory at once (0: none).",
            most=MAX_PREFETCHED,
        ),
    )

    @property
    def has_index(self) -> bool:
        """True if the sample order is an index that is built; the other orders are computed per sample or epoch."""
        return self.sampling == "concatenated" and self.index_order != "closed-form"


def resolve_blend_files(given: Given) -> None:
    """Read the files that flags name. A missing file is an error for a run, but not for an explanation."""
    for source, target, read in (
        (FIELD.command.data_args_path, FIELD.data.sources, _read_sources_file),
        (FIELD.command.train_groups_path, FIELD.data.train_groups, read_groups_file),
        (FIELD.command.valid_groups_path, FIELD.data.valid_groups, read_groups_file),
        (FIELD.command.test_groups_path, FIELD.data.test_groups, read_groups_file),
    ):
        origin = given.origin(source)
        if not origin:
            continue
        if given.has(target):
            given.refuse_both(origin, given.origin(target))
            continue
        flag, _, path = origin.partition(" ")
        text = given.read_file(path, flag)
        if text is None:
            continue
        try:
            given.give(target, read(text), origin)
        except ValueError as error:
            given.refuse(
                f'Cannot read "{path}" ({flag}): expected {error}',
                fix=f"Rewrite {path} in that form, or give the data by {flag.removesuffix('-path')}",
            )


def _read_sources_file(text: str) -> tuple[DataSource, ...]:
    return read_sources(text.split())


RESOLVERS = (resolve_blend_files,)


def one_kind_of_data(config: RunConfig) -> Iterator[ConfigError]:
    """Require one kind of data: a blend that is split, a blend for each split, or mock data."""
    data = config.data
    kinds = {
        "--data-path": bool(data.sources),
        "--train-weighted-split-paths or --train-data-path": bool(
            data.train_groups or data.valid_groups or data.test_groups
        ),
        "--mock-data": data.mock,
    }
    given = [name for name, present in kinds.items() if present]
    if len(given) > 1:
        yield ConfigError(
            f"Training data are given more than once: by {' and '.join(given)}",
            fix=f"Keep one of these: {', '.join(given)}",
        )


def one_sample_order(config: RunConfig) -> Iterator[ConfigError]:
    """Require one order of the samples: slices of documents have their own."""
    if config.data.sampling == "slice" and config.data.index_order == "closed-form":
        yield ConfigError(
            "--document-sampling slice and --sample-order closed-form contradict each other",
            rule="--document-sampling slice has a sample order of its own",
            fix="Remove one of the two flags",
        )


def weights_are_positive(config: RunConfig) -> Iterator[ConfigError]:
    """Require weights of a blend that are not negative, and not all 0."""
    data = config.data
    groups = (*data.train_groups, *data.valid_groups, *data.test_groups)
    for sources in (data.sources, *(group.sources for group in groups)):
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and (min(weights) < 0 or not any(weights)):
            yield ConfigError(
                f"The datasets have {'a negative weight' if min(weights) < 0 else 'no weight above 0'}: "
                f"{', '.join(f'{source.weight:g} {source.path}' for source in sources if source.weight is not None)}",
                fix="Give a positive weight before each path that is to be read, for example --data-path 0.3 a 0.7 b",
            )


def groups_have_names(config: RunConfig) -> Iterator[ConfigError]:
    """Require one group for training, and different names of validation and test sets."""
    data = config.data
    if len(data.train_groups) > 1:
        yield ConfigError(
            f"--train-weighted-split-paths has {len(data.train_groups)} groups "
            f"({', '.join(group.name for group in data.train_groups)}) instead of one",
            fix="Join them: --train-weighted-split-paths 'NAME: WEIGHT START:END PATH, WEIGHT START:END PATH'",
        )
    for flag, groups in (
        ("--valid-weighted-split-paths", data.valid_groups),
        ("--test-weighted-split-paths", data.test_groups),
    ):
        names = [group.name for group in groups]
        if len(set(names)) != len(names) or not all(names):
            twice = next((name for name in names if name and names.count(name) > 1), "")
            yield ConfigError(
                f'{flag}: the group name "{twice}" is used twice' if twice else f"{flag} has a group without a name",
                fix=f"Name each group differently before the colon, for example {flag} "
                f"'en: 1 0:1 PATH' 'fr: 1 0:1 PATH'",
            )


RULES = (one_kind_of_data, one_sample_order, weights_are_positive, groups_have_names)
