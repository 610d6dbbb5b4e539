"""CLI commands `data samples` and `data index`: print a job's training samples, build its sample indices."""

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
    """Print every sample of an iteration: number, spans in the datasets, and beginning of the text."""
    parser = Parser(
        prog="megatron-lite data samples",
        usage="%(prog)s --iteration N [--tokens N] JOB_FLAGS",
        description="Print the documents and the text that an iteration trains on. Give the job's flags or its whole "
        "command, including --load: iterations before the latest checkpoint are printed as they were read, even if the "
        "flags have changed since.",
    )
    parser.add_argument(
        "--iteration", type=whole(1), required=True, metavar="N", help="iteration number as in the log, from 1"
    )
    parser.add_argument(
        "--tokens", type=whole(), default=32, metavar="N", help="tokens of each document to print (default 32)"
    )
    options, args = parser.parse_known_args(argv)

    from megatron_lite.cli.data_position import find_position
    from megatron_lite.data.serving.loader import Loader
    from megatron_lite.schedules.batch_size import global_batch_size
    from megatron_lite.schedules.length import is_skipped_iteration
    from megatron_lite.schedules.sequence_length import sequence_length

    given = _read(args)
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
    loader = Loader(
        datasets.train,
        micro_batch=batch.micro_batch_size,
        global_batch=lambda _: count,
        dp=dp,
        cyclic_layout=position.order.cyclic_layout,
    )
    loader.skipped = position.skipped
    for order_position, sample in zip(loader.positions(consumed, count), loader.samples(consumed, count), strict=True):
        number = f", number {sample:,} of the dataset" if sample != order_position else ""
        print(f"\nsample {order_position:,}{number}")
        _show(datasets.train, sample, length + 1, tokenizer, options.tokens)
    return 0


def _require_iteration(config: RunConfig, iteration: int, consumed: int, count: int) -> None:
    """Check that the run has this iteration; a run with --train-samples ends with its samples."""
    from megatron_lite.schedules.length import last_iteration

    last, samples = last_iteration(config), config.training.train_samples
    if iteration > last if not samples or config.training.train_tokens else consumed + count > samples:
        raise ConfigError(
            f"--iteration {iteration} is out of range: with these flags the run has {last:,} iterations",
            fix=f"Give --iteration 1 to {last}, or the --train-iters or --train-samples of the run",
        )


def build_indices(argv: list[str]) -> int:
    """Build the sample indices of a job, and print the sizes of its sets."""
    parser = Parser(
        prog="megatron-lite data index",
        usage="%(prog)s JOB_FLAGS",
        description="Build the sample indices of a job and write them to the cache, so that the job starts without a "
        "delay. Prints the number of samples of each set.",
    )
    _, args = parser.parse_known_args(argv)
    started = time.monotonic()
    config = _read(args)
    from megatron_lite.cli.data_position import saved_history

    _, datasets = _open(config, saved_history(config)[-1])
    if not config.data.has_index:
        print("nothing to build: this sample order has no index")
    for text in (*datasets.notices.details, *datasets.notices.warnings):
        print(text)
    sets = {"train": datasets.train, **datasets.valid, **{f"{name} (test)": s for name, s in datasets.test.items()}}
    for name, dataset in sets.items():
        if dataset is not None:
            print(f"{name}: {len(dataset):,} samples from {', '.join(dataset.sources)}")
    print(f"ready in {time.monotonic() - started:.1f} s")
    return 0


def _read(args: list[str]) -> RunConfig:
    """Return the config of the job with these flags."""
    from megatron_lite.config.arguments import parse_command, raise_all
    from megatron_lite.data.serving.epochs import with_epochs

    parsed = parse_command(args)
    raise_all(parsed.missing)
    return with_epochs(parsed.config)


def _open(config: RunConfig, order: DataSegment) -> tuple[Tokenizer, Datasets]:
    """Return a job's tokenizer and datasets."""
    from megatron_lite.data.serving.build import build_datasets
    from megatron_lite.tokenizer.build import build_tokenizer

    tokenizer = build_tokenizer(config.tokenizer)
    datasets = build_datasets(
        config, order, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint()
    )
    return tokenizer, datasets


def _show(dataset: Dataset, sample: int, length: int, tokenizer: Tokenizer, shown: int) -> None:
    """Print the spans of the first `length` tokens of a sample."""
    item, start = dataset[sample], 0
    tokens = (item if item.ndim == 1 else item[0])[:length]  # row 1 is the loss mask
    for prefix, (sequence, offset, count) in dataset.spans(sample):
        part = tokens[start : start + count]
        start += count
        if not part.shape[0]:
            return
        ids = part[:shown].tolist()
        more = " …" if part.shape[0] > shown else ""
        span = f"sequence {sequence:,}, tokens {offset:,} to {offset + part.shape[0] - 1:,}"
        print(f"  {prefix} {span}\n    {tokenizer.decode(ids)!r}{more}")
