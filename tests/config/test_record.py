import dataclasses
import json

import pytest

from megatron_lite.config.batch import BatchConfig, Rampup, SequenceRamp
from megatron_lite.config.checkpoint import CheckpointConfig, SavePhase
from megatron_lite.config.data import DataConfig, DataGroup, DataSource
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.errors import ConfigError

FULL = RunConfig(
    model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, activation="swiglu"),
    batch=BatchConfig(
        seq_length=16,
        micro_batch_size=2,
        rampup=Rampup(start=2, increment=2, samples=100),
        step_schedule=((0, 4), (100, 8)),
        sequence_ramp=SequenceRamp(stages=((0, 8), (10, 16))),
    ),
    data=DataConfig(
        sources=(DataSource(path="a", weight=0.25), DataSource(path="b")),
        valid_groups=(DataGroup(name="wiki", sources=(DataSource(path="c", start=0.5),)),),
    ),
    optimizer=OptimizerConfig(start_weight_decay=0.1),
    checkpoint=CheckpointConfig(phases=(SavePhase(interval=10, until=100), SavePhase(interval=50))),
    training=TrainingConfig(train_iters=10, skip_iteration_ranges=((3, 4),)),
)


def test_config_round_trip_through_json():
    record = json.loads(json.dumps(dataclasses.asdict(FULL)))
    assert from_record(RunConfig, record) == FULL


def test_a_missing_field_takes_the_default():
    record = dataclasses.asdict(FULL)
    del record["metrics"], record["model"]["rotary_scaling"]
    assert from_record(RunConfig, record) == FULL


def test_a_field_of_a_newer_version_is_named():
    record = dataclasses.asdict(FULL)
    record["model"]["mixture"] = 8
    with pytest.raises(
        ConfigError, match=r"ModelConfig.*fields that this version of megatron_lite does not have: mixture"
    ):
        from_record(RunConfig, record)


def test_a_missing_field_is_named():
    record = dataclasses.asdict(FULL)
    del record["model"]["num_layers"]
    with pytest.raises(ConfigError, match="num_layers"):
        from_record(RunConfig, record)
