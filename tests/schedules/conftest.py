"""Fixture for RunConfigs with given schedule fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.checkpoint import CheckpointConfig
from megatron_lite.config.learning_rate import LrConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig

SECTIONS = (BatchConfig, TrainingConfig, LrConfig, OptimizerConfig, CheckpointConfig)


def build(**fields: Any) -> RunConfig:
    """Return a function that builds a RunConfig from field names of its sections, and `dp`."""
    values: dict[type, dict[str, Any]] = {BatchConfig: {"seq_length": 32, "micro_batch_size": 1}}
    world_size = fields.pop("dp", 1)
    for name, value in fields.items():
        section = next(section for section in SECTIONS if name in section.__dataclass_fields__)
        values.setdefault(section, {})[name] = value
    batch, training, lr, optimizer, checkpoint = (section(**values.get(section, {})) for section in SECTIONS)
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1),
        parallel=ParallelConfig(world_size=world_size),
        batch=batch,
        training=training,
        lr=lr,
        optimizer=optimizer,
        checkpoint=checkpoint,
    )


@pytest.fixture(scope="session")
def run_config() -> Callable[..., RunConfig]:
    return build
