"""Control codes: each training dataset has its own validation set, and its documents begin with its code."""

import numpy as np
import pytest

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig, DataGroup, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.config.tuning import TuningConfig
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.manifest import manifest_of, write_manifest
from megatron_lite.data.serving.build import build_datasets
from megatron_lite.errors import DataError


@pytest.fixture
def source(tmp_path):
    """Return a function that writes a dataset whose manifest records a code, and returns its source."""

    def write(name, code="", documents=40):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for number in range(documents):
                writer.add_document([number % 50] * 10)
        tokenizer = {"control_code": code} if code else {}
        pieces = [(writer.num_bytes, 0)]
        write_manifest(tmp_path / name, manifest_of(writer, pieces, tokenizer, flags={}, inputs=[]))
        return DataSource(path=str(tmp_path / name))

    return write


def sets(codes=("a", "b"), **data):
    return build_datasets(
        RunConfig(
            model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=100),
            batch=BatchConfig(seq_length=8, micro_batch_size=2, global_batch_size=4),
            training=TrainingConfig(train_iters=5, eval_iters=1),
            data=DataConfig(**data),
            tuning=TuningConfig(control_codes=codes),
        )
    )


def test_the_split_gives_each_code_a_validation_set(source):
    sources = (source("one", "a"), source("two", "b"))
    found = sets(sources=sources, split="80,20,0")
    assert [dataset.sources for dataset in found.valid.values()] == [(one.path,) for one in sources]
    assert list(found.valid) == ["a", "b"]
    assert all(len(dataset) >= 8 for dataset in found.valid.values())
    assert len(found.train.sources) == 2


def test_validation_datasets_belong_to_the_codes_in_their_order(source):
    train = DataGroup(name="train", sources=(source("one", "a"), source("two", "b")))
    valid = DataGroup(name="valid", sources=(source("three", "a"), source("four", "b")))
    found = sets(train_groups=(train,), valid_groups=(valid,))
    assert {code: dataset.sources[0][-4:] for code, dataset in found.valid.items()} == {"a": "hree", "b": "four"}
    swapped = DataGroup(name="valid", sources=valid.sources[::-1])
    with pytest.raises(DataError, match=r"four begin with the code b, and --control-codes gives a for this dataset"):
        sets(train_groups=(train,), valid_groups=(swapped,))


def test_a_code_without_a_validation_set(source):
    sources = (source("one", "a"), source("two", "b", documents=3))
    with pytest.raises(DataError, match=r"control code b has no validation set: --split 90,10,0 assigns no document"):
        sets(sources=sources, split="90,10,0")


def test_a_dataset_without_the_code(source):
    with pytest.raises(DataError, match=r"one begin without a recorded control code, and --control-codes gives a"):
        sets(codes=("a",), sources=(source("one"),), split="80,20,0")
