"""Tests of jobs that a device cannot run: refused before anything is built."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.interop_models import run_config

from megatron_lite.backend.base import Capabilities
from megatron_lite.config.fp8 import Fp8Config
from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.errors import ConfigError
from megatron_lite.train.comparison import check_capabilities


@pytest.mark.parametrize(
    ("able", "changes", "message"),
    [
        ({"fp8": False}, {"fp8": Fp8Config(format="e4m3")}, r"Card has no fp8 matrix products \(--fp8-format e4m3\)"),
        ({"compile": False}, {"compile": "layer"}, "Card does not support --compile"),
        ({"dtypes": frozenset({"fp16"})}, {}, "Card does not support fp32, .* supports fp16"),
        ({"float64": False}, {"optimizer": OptimizerConfig(kind="adafactor")}, "Card cannot run --optimizer adafactor"),
    ],
)
def test_what_a_device_lacks_is_refused(able, changes, message):
    config = run_config()
    if "compile" in changes:
        config = replace(config, runtime=replace(config.runtime, compile=changes["compile"]))
    config = replace(config, fp8=changes.get("fp8", config.fp8), optimizer=changes.get("optimizer", config.optimizer))
    backend = SimpleNamespace(name="card", device_name=lambda: "Card", capabilities=lambda: Capabilities(**able))
    with pytest.raises(ConfigError, match=message):
        check_capabilities(config, backend)
