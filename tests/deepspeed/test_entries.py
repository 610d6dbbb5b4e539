"""Tests that our table of DeepSpeed JSON entries has the entries and defaults of DeepSpeed's config classes."""

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from megatron_lite.config.deepspeed_entries import REFUSED, RENAMED, WITHOUT_EFFECT
from megatron_lite.config.deepspeed_kinds import SECTIONS

CLASSES = {
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
}


@pytest.mark.parametrize("section", CLASSES)
def test_the_table_is_deepspeeds(section):
    fields = {field.alias or name: field for name, field in CLASSES[section].model_fields.items()}
    kinds = SECTIONS[section]
    assert kinds.keys() <= fields.keys()
    elsewhere = {*SECTIONS, *WITHOUT_EFFECT, *REFUSED, *RENAMED}
    assert not [name for name in fields.keys() - kinds.keys() if f"{section}.{name}" not in elsewhere]
    for name, kind in kinds.items():
        if kind.without is None and not kind.nullable:
            assert kind.example == fields[name].default, name
