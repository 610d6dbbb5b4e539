"""CLI commands `data samples` and `data index`: show a job's training samples, build its sample indices."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_lite.cli.parser import Parser, whole
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig
    from megatron_lite.data.serving.build import Datasets
    from megatron_lite.data.serving.dataset import Dataset
    from megatron_lite.schedules.data_order import DataSegment
    from megatron_lite.tokenizer.base import Tokenizer


def show_samples(argv: list[str]) -> int:
    """Print every sample of an iteration: its number, where its tokens lie, and how its text begins."""
    parser = Parser(
        prog="megatron-lite data samples",
        usage="%(prog)s --iteration N [--tokens N] THE JOB'S FLAGS",
        description="Which documents and text an iteration trains on. Give the job's own flags or its whole command, "
        "--load too: iterations before the latest checkpoint are shown as they were read, whatever the flags have "
        "become since.",
        allow_abbrev=False,
    )
    parser.add_argument("--iteration", type=whole(1), required=True, metavar="N", help="as the log numbers it, from 1")
    parser.add_argument(
        "--tokens", type=whole(), default=32, metavar="N", help="tokens of each document to show (default 32)"
    )
    options, words = parser.parse_known_args(argv)

    from megatron_lite.cli.data_position import find_position
    from megatron_lite.data.serving.loader import Loader
    from megatron_lite.schedules.batch_size import global_batch_size
    from megatron_lite.schedules.length import is_skipped_iteration
    from megatron_lite.schedules.sequence_length import sequence_length

    given = _read(words)
    given = replace(given, training=replace(given.training, skip_train=False))
    position = find_position(given, options.iteration)
    config, consumed = position.config, position.consumed
    batch, dp = config.batch, config.parallel.dp
    count, length = global_batch_size(batch, consumed, dp), sequence_length(batch, options.iteration - 1)
    if not position.past:
        _require_iteration(config, options.iteration, consumed, count)
    tokenizer, datasets = _open(config, position.order)
    assert datasets.train is not None
    for text in datasets.notices.warnings:
        print(text, file=sys.stderr)
    print(f"iteration {options.iteration}: samples {consumed:,} to {consumed + count - 1:,}, {length} tokens each")
    for line in position.notes:
        print(f"  {line}")
    if is_skipped_iteration(config.training, options.iteration):
        print("  --skip-train-iteration-range: its samples are consumed, but not trained on")
    with Loader(
        datasets.train,
        micro_batch=batch.micro_batch_size,
        global_batch=lambda _: count,
        dp=dp,
        prefetch=0,
        cyclic_layout=position.order.cyclic_layout,
    ) as loader:
        loader.skipped = position.skipped
        for place, sample in zip(loader.positions(consumed, count), loader.samples(consumed, count), strict=True):
            print(f"\nsample {place:,}" + (f", number {sample:,} of the dataset" if sample != place else ""))
            _show(datasets.train, sample, length + 1, tokenizer, options.tokens)
    return 0


def _require_iteration(config: RunConfig, iteration: int, consumed: int, count: int) -> None:
    """Refuse an iteration that the run does not have; one counted in samples ends where its data does."""
    from megatron_lite.schedules.length import last_iteration

    last, samples = last_iteration(config), config.training.train_samples
    if iteration > last if not samples or config.training.train_tokens else consumed + count > samples:
        raise ConfigError(
            "Iterations are numbered up to the run's last",
            found=f"--iteration {iteration}, the run has {last:,}",
            fix="Give one of them, or the --train-iters or --train-samples that the run has",
        )


def build_indices(argv: list[str]) -> int:
    """Build what a job's start would build."""
    parser = Parser(
        prog="megatron-lite data index",
        usage="%(prog)s THE JOB'S FLAGS",
        description="Build and keep the sample index, so that the job starts at once; say how many samples a set has.",
        allow_abbrev=False,
    )
    _, words = parser.parse_known_args(argv)
    began = time.monotonic()
    config = _read(words)
    from megatron_lite.cli.data_position import saved_history

    _, datasets = _open(config, saved_history(config)[-1])
    for text in (*datasets.notices.details, *datasets.notices.warnings):
        print(text)
    sets = {"train": datasets.train, **datasets.valid, **{f"{name} (test)": s for name, s in datasets.test.items()}}
    for name, dataset in sets.items():
        if dataset is not None:
            print(f"{name}: {len(dataset):,} samples from {', '.join(dataset.sources)}")
    print(f"ready in {time.monotonic() - began:.1f} s")
    return 0


def _read(words: list[str]) -> RunConfig:
    """The job that the flags describe."""
    from megatron_lite.config.arguments import parse_command, raise_all

    parsed = parse_command(words)
    raise_all(parsed.missing)
    return parsed.config


def _open(config: RunConfig, order: DataSegment) -> tuple[Tokenizer, Datasets]:
    """Open a job's tokenizer and its datasets."""
    from megatron_lite.data.serving.build import build_datasets
    from megatron_lite.tokenizer.build import build_tokenizer

    tokenizer = build_tokenizer(config.tokenizer)
    datasets = build_datasets(
        config, order, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint()
    )
    return tokenizer, datasets


def _show(dataset: Dataset, sample: int, length: int, tokenizer: Tokenizer, shown: int) -> None:
    """Print the spans of one sample, as far as `length` tokens reach."""
    tokens, start = dataset[sample][:length], 0
    for prefix, (sequence, offset, count) in dataset.spans(sample):
        part = tokens[start : start + count]
        start += count
        if not part.shape[0]:
            return
        ids = part[:shown].tolist()
        more = " …" if part.shape[0] > shown else ""
        place = f"sequence {sequence:,}, tokens {offset:,} to {offset + part.shape[0] - 1:,}"
        print(f"  {prefix} {place}\n    {tokenizer.decode(ids)!r}{more}")
