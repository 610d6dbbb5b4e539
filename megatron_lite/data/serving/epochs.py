"""Run length in epochs (--epochs): samples of one pass over the training data, counted from the dataset indices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_lite.config.arguments import raise_all
from megatron_lite.config.data import DataSource
from megatron_lite.config.learning_rate import lr_spans, wsd_has_a_decay
from megatron_lite.config.run import RunConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.order.split import Order, range_bounds, split_bounds
from megatron_lite.data.serving.closed_form import samples_per_epoch
from megatron_lite.errors import ConfigError
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size
from megatron_lite.schedules.length import consumed_at


def with_epochs(config: RunConfig) -> RunConfig:
    """Return the config with --epochs as a number of samples, and lengths of the schedule in samples.

    The run has as many whole global batches, of any ramp-up, as fit in its epochs. A run without --epochs is returned
    unchanged.

    Raises:
        DataError: a dataset is missing, damaged or too small.
        ConfigError: the epochs hold less than one global batch, or the learning rate's schedule does not fit in them.
    """
    epochs = config.tuning.epochs
    if not epochs or config.training.skip_train:
        return config
    one = sum(_samples(config, source) for source in _sources(config))
    if (first := global_batch_size(config.batch, 0, config.parallel.dp)) > epochs * one:
        raise ConfigError(
            f"--epochs {epochs} of the training data are {epochs * one:,} samples, less than one global batch of "
            f"{first:,}",
            fix=f"Give more --epochs, or a --global-batch-size of at most {epochs * one}",
        )
    lr, unit = config.lr, final_batch_size(config.batch, config.parallel.dp)
    resolved = replace(
        config,
        training=replace(config.training, train_samples=epochs * one),
        lr=replace(
            lr,
            warmup_samples=lr.warmup_samples or consumed_at(config, lr.warmup_iters),
            decay_samples=lr.decay_samples or consumed_at(config, lr.decay_iters),
            wsd_decay_samples=lr.wsd_decay_samples or lr.wsd_decay_iters * unit,
        ),
    )
    raise_all([error for rule in (lr_spans, wsd_has_a_decay) for error in rule(resolved)])
    return resolved


def source_samples(config: RunConfig, data: IndexedDataset, bounds: tuple[int, int]) -> int:
    """Return the samples of one pass over sequences [bounds) of a file.

    Raises:
        DataError: the sequences hold fewer tokens than one sample, or the index is damaged.
    """
    if config.data.sampling == "slice":
        return int(np.count_nonzero(data.sizes[bounds[0] : bounds[1]]))
    return samples_per_epoch(data, bounds, config.batch.seq_length)


def _sources(config: RunConfig) -> tuple[DataSource, ...]:
    """Return the sources of the training data."""
    data = config.data
    return data.sources or tuple(source for group in data.train_groups for source in group.sources)


def _samples(config: RunConfig, source: DataSource) -> int:
    """Return the samples of one pass over the training documents of a source; 0 if it has none."""
    opened = IndexedDataset(source.path)
    if config.data.sources:
        order: Order = "legacy" if config.data.index_order == "legacy" else "modern"
        bounds = split_bounds(config.data.split, len(opened), order)
        first, last = bounds[0], bounds[1]
    else:
        first, last = range_bounds(source.start, source.end, len(opened))
    return source_samples(config, opened, (first, last)) if first < last else 0
