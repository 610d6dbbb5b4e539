"""Epochs: counted from the datasets, each a pass over all documents, also of several datasets."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from megatron_lite.config.batch import BatchConfig, Rampup
from megatron_lite.config.data import DataConfig, DataSource
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.serving.build import build_datasets
from megatron_lite.data.serving.epochs import with_epochs
from megatron_lite.errors import ConfigError, ConfigErrors
from megatron_lite.schedules.data_order import extend_history
from megatron_lite.schedules.length import consumed_at, last_iteration
from megatron_lite.schedules.progress import Progress

LENGTH = 8


def config(tmp_path, sizes=((30, 50), (20, 50), (9, 50)), epochs=3, **data):
    """Return a run on datasets of (documents, largest length)."""
    sources = []
    for number, (documents, longest) in enumerate(sizes):
        rng = np.random.RandomState(number)
        with IndexedDatasetWriter(tmp_path / str(number), np.uint16) as writer:
            for size in rng.randint(1, longest, documents):
                writer.add_document(rng.randint(0, 100, size))
        sources.append(DataSource(path=str(tmp_path / str(number))))
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=100),
        batch=BatchConfig(seq_length=LENGTH, micro_batch_size=2, global_batch_size=4),
        data=DataConfig(sources=tuple(sources), split="1", **data),
        lr=LrConfig(lr=1e-3),
        tuning=TuningConfig(epochs=epochs),
    )


@pytest.mark.parametrize("data", [{}, {"index_order": "modern"}, {"index_order": "closed-form"}, {"sampling": "slice"}])
@pytest.mark.parametrize("count", [1, 3])
def test_each_epoch_reads_each_sample_once(tmp_path, data, count):
    given = with_epochs(config(tmp_path, **data) if count > 1 else config(tmp_path, ((30, 50),), **data))
    one = given.epoch_samples
    train = build_datasets(given).train
    assert given.training.train_samples == 3 * one == len(train)
    epochs = [[str(train.spans(sample)) for sample in range(number * one, (number + 1) * one)] for number in range(3)]
    assert epochs[0] != epochs[1]
    if "sampling" in data:  # the offset in a document is drawn in each epoch: each document begins one sample
        epochs = [[text.split(",")[0] + text.split(",")[1] for text in texts] for texts in epochs]
    for number, texts in enumerate(epochs):
        if data.get("index_order") == "closed-form" or "sampling" in data:
            assert sorted(texts) == sorted(epochs[0])
        assert len(set(texts)) == one, number
    if not data or "modern" in data.values():  # other documents are cut in each epoch, but tokens are read once
        for number in range(3):
            read = {}
            for sample in range(number * one, (number + 1) * one):
                for prefix, (sequence, offset, length) in train.spans(sample):
                    read.setdefault((prefix, sequence), []).append((offset, length))
            overlaps = [
                max(0, a + n - b)
                for spans in map(sorted, read.values())
                for (a, n), (b, _) in itertools.pairwise(spans)
            ]
            assert max(overlaps, default=0) <= 1  # the last label of a sample is the first token of the next


def test_more_epochs_keep_the_order_of_the_first(tmp_path):
    two = with_epochs(config(tmp_path, epochs=2))
    three = with_epochs(replace(config(tmp_path, epochs=3)))
    history = extend_history((), two)
    (*_, later) = extend_history(history, three, Progress(iteration=3, consumed_train_samples=12))
    ours, begun = build_datasets(three, later).train, build_datasets(two, history[-1]).train
    assert all(ours.spans(sample) == begun.spans(sample) for sample in range(len(begun)))
    assert len(ours) == 3 * three.epoch_samples


def test_a_ramp_up_and_schedules_in_iterations(tmp_path):
    given = config(tmp_path)
    batch = replace(
        given.batch, micro_batch_size=1, global_batch_size=6, rampup=Rampup(start=1, increment=1, samples=20)
    )
    given = replace(given, batch=batch, lr=replace(given.lr, warmup_iters=5, decay_iters=15))
    found = with_epochs(given)
    assert (found.lr.warmup_samples, found.lr.decay_samples) == (consumed_at(given, 5), consumed_at(given, 15))
    end = consumed_at(found, last_iteration(found))
    assert 0 <= found.training.train_samples - end < 6


def test_epochs_that_hold_no_batch(tmp_path):
    given = config(tmp_path, ((3, 12),), epochs=1)
    given = replace(given, batch=replace(given.batch, global_batch_size=400))
    with pytest.raises(ConfigError, match=r"--epochs 1 of the training data are . samples, less than one global batch"):
        with_epochs(given)


def test_a_warm_up_longer_than_the_epochs(tmp_path):
    given = config(tmp_path)
    with pytest.raises((ConfigError, ConfigErrors), match="warm-up is longer than the whole schedule"):
        with_epochs(replace(given, lr=replace(given.lr, warmup_iters=10_000)))
