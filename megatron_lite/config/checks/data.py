"""Validation rules for datasets and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checks.bounds import at_least
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError

MOST_PREFETCHED = 1000
"""Micro-batches that may be read ahead."""


def one_kind_of_data(config: RunConfig) -> Iterator[ConfigError]:
    """Data come as one blend that is split, as a blend for each split, or from nowhere."""
    data = config.data
    kinds = {
        "--data-path": bool(data.sources),
        "--train-weighted-split-paths and its kin": bool(data.train_groups or data.valid_groups or data.test_groups),
        "--mock-data": data.mock,
    }
    given = [name for name, present in kinds.items() if present]
    if len(given) > 1:
        yield ConfigError(
            "A run's data are given in one way", found=" and ".join(given), fix=f"Keep one of {', '.join(given)}"
        )


def weights_are_positive(config: RunConfig) -> Iterator[ConfigError]:
    """A blend's weights are not negative, and not all 0."""
    data = config.data
    groups = (*data.train_groups, *data.valid_groups, *data.test_groups)
    for sources in (data.sources, *(group.sources for group in groups)):
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and (min(weights) < 0 or not any(weights)):
            yield ConfigError(
                "The weights of a blend are not negative, and not all 0",
                found=", ".join(f"{source.weight} {source.path}" for source in sources),
                fix="Give a positive number before each path that is to be read, as 0.3 a 0.7 b",
            )


def groups_have_names(config: RunConfig) -> Iterator[ConfigError]:
    """Training has one group; the sets of a validation differ in name."""
    data = config.data
    if len(data.train_groups) > 1:
        yield ConfigError(
            "The training data are one group",
            found=f"{len(data.train_groups)} groups: {', '.join(group.name for group in data.train_groups)}",
            fix="Join them: weights, ranges and paths, separated by commas",
        )
    for flag, groups in (
        ("--valid-weighted-split-paths", data.valid_groups),
        ("--test-weighted-split-paths", data.test_groups),
    ):
        names = [group.name for group in groups]
        if len(set(names)) != len(names) or not all(names):
            fix = f"Give each group its own name before the colon, as {flag} 'en: 1 0:1 PATH' 'fr: 1 0:1 PATH'"
            yield ConfigError(f"The groups of {flag} have names that differ", found=", ".join(names), fix=fix)


def prefetch_is_bounded(config: RunConfig) -> Iterator[ConfigError]:
    """All micro-batches that are read ahead are in memory at once."""
    prefetch = config.data.prefetch
    yield from at_least(0, prefetch_microbatches=prefetch)
    if prefetch > MOST_PREFETCHED:
        yield ConfigError(
            f"--prefetch-microbatches is at most {MOST_PREFETCHED:,}, since all are in memory at once",
            found=f"--prefetch-microbatches {prefetch:,}",
            fix="Give a few; 2 is enough unless the file system pauses for seconds",
        )


def tokenizer_has_a_size(config: RunConfig) -> Iterator[ConfigError]:
    """A NullTokenizer is nothing but its size."""
    tokenizer = config.tokenizer
    yield from at_least(0, vocab_extra_ids=tokenizer.vocab_extra_ids)
    if tokenizer.type == "NullTokenizer" and not tokenizer.vocab_size:
        yield ConfigError(
            "A NullTokenizer needs its size",
            found="--tokenizer-type NullTokenizer without --vocab-size",
            fix="Give --vocab-size the number of token ids of the data, without that of the end of a document",
        )


RULES = (one_kind_of_data, weights_are_positive, groups_have_names, prefetch_is_bounded, tokenizer_has_a_size)
