"""megatron-lite data samples and index: a job's own flags, answered about its data instead of training."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.run import RunConfig
    from megatron_lite.data.build import Datasets
    from megatron_lite.data.dataset import Dataset
    from megatron_lite.schedules.skipping import Ranges
    from megatron_lite.tokenizer.base import Tokenizer


def show_samples(argv: list[str]) -> int:
    """Print every sample of an iteration: its number, where its tokens lie, and how its text begins."""
    parser = argparse.ArgumentParser(prog="megatron-lite data samples", allow_abbrev=False)
    parser.add_argument("--iteration", type=int, required=True, metavar="N", help="as the log numbers it, from 1")
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="tokens of each document to show (default 32)"
    )
    options, words = parser.parse_known_args(argv)
    if options.iteration < 1:
        raise ConfigError(
            "Iterations are numbered from 1", found=f"--iteration {options.iteration}", fix="Give 1 or more"
        )

    from megatron_lite.data.loader import Loader
    from megatron_lite.schedules.batch_size import global_batch_size
    from megatron_lite.schedules.length import consumed_at, is_skipped_iteration
    from megatron_lite.schedules.sequence_length import sequence_length

    config, tokenizer, datasets = _open(words)
    batch, dp = config.batch, config.parallel.dp
    consumed = consumed_at(config, options.iteration - 1)
    count, length = global_batch_size(batch, consumed, dp), sequence_length(batch, options.iteration - 1)
    assert datasets.train is not None
    print(f"iteration {options.iteration}: samples {consumed:,} to {consumed + count - 1:,}, {length} tokens each")
    if is_skipped_iteration(config.training, options.iteration):
        print("  it is skipped by --iteration-to-skip or its like: its samples are consumed, but not trained on")
    with Loader(
        datasets.train,
        micro_batch=batch.micro_batch_size,
        global_batch=lambda _: count,
        dp=dp,
        prefetch=0,
        cyclic=config.data.sampler == "cyclic",
        skipped=_left_out(config),
    ) as loader:
        for place, sample in zip(loader.places(consumed, count), loader.samples(consumed, count), strict=True):
            print(f"\nsample {place:,} (number {sample:,} of the dataset)")
            _show(datasets.train, sample, length + 1, tokenizer, options.tokens)
    return 0


def _left_out(config: RunConfig) -> Ranges:
    """What the run of --load leaves out of its data since a rollback."""
    if not config.checkpoint.load:
        return ()
    from megatron_lite.checkpoint.catalog import find_checkpoint
    from megatron_lite.checkpoint.manifest import read_manifest

    found = find_checkpoint(config.checkpoint.load, config.checkpoint.load_iteration)
    return read_manifest(found).provenance.skipped_samples if found is not None else ()


def build_indices(argv: list[str]) -> int:
    """Build what a job's start would build."""
    began = time.monotonic()
    _, _, datasets = _open(argv)
    sets = {"train": datasets.train, **datasets.valid, **{f"{name} (test)": s for name, s in datasets.test.items()}}
    for name, dataset in sets.items():
        if dataset is not None:
            print(f"{name}: {len(dataset):,} samples from {', '.join(dataset.sources)}")
    print(f"ready in {time.monotonic() - began:.1f} s")
    return 0


def _open(words: list[str]) -> tuple[RunConfig, Tokenizer, Datasets]:
    """The job that the flags describe, its tokenizer and its datasets."""
    from megatron_lite.config.arguments import parse_run, raise_all
    from megatron_lite.data.build import build_datasets
    from megatron_lite.tokenizer.build import build_tokenizer

    parsed = parse_run(words)
    raise_all(parsed.missing)
    tokenizer = build_tokenizer(parsed.config.tokenizer)
    datasets = build_datasets(
        parsed.config, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint()
    )
    return parsed.config, tokenizer, datasets


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
