"""Every ZeRO stage of the DeepSpeed engine trains the model that the native engine trains."""

import dataclasses

import pytest
from support.layout_matrix import (
    LIMITS,
    SP,
    Cell,
    deviation,
    put_together,
    run_cell,
    within,
)

from megatron_lite.config.deepspeed import DeepSpeedConfig, write_settings
from megatron_lite.train.deepspeed import build_deepspeed_engine

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def small_scale(config):
    """Return the config with a loss scale that does not overflow: DeepSpeed's gradients are larger by the replicas."""
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, initial_loss_scale=2.0**10))


def config_of(cell, zero):
    config = small_scale(cell.config())
    return dataclasses.replace(
        config,
        runtime=dataclasses.replace(config.runtime, engine="deepspeed"),
        deepspeed=DeepSpeedConfig(settings=write_settings({"zero_optimization": zero})),
    )


def run_deepspeed(backend, cell, zero):
    """As layout_matrix.run_cell, on the DeepSpeed engine."""
    return run_cell(backend, cell, config_of(cell, zero), build_deepspeed_engine)


def run_native(backend, cell):
    """As layout_matrix.run_cell, with the loss scale of the other engine."""
    return run_cell(backend, cell, small_scale(cell.config()))


CELLS = [
    (Cell(dp=2), {"stage": 0}),
    (Cell(dp=2), {"stage": 1}),
    (Cell(dp=2, model="llama"), {"stage": 2}),
    (Cell(dp=2, model="llama"), {"stage": 3}),
    (Cell(dp=2, model="albert"), {"stage": 3, "stage3_param_persistence_threshold": 0}),
    (Cell(dp=2), {"stage": 2, **OFFLOAD}),
    (Cell(dp=2, recompute="full"), {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}}),
    (Cell(tp=2, dp=2, model="llama", **SP), {"stage": 3}),
    (Cell(tp=2, dp=2, dropout="hidden"), {"stage": 2}),
    (Cell(tp=2, dp=2), {"stage": 0}),
    (Cell(dp=4, documents=True), {"stage": 3}),
    (Cell(dp=2, dtype="bf16"), {"stage": 1}),
    (Cell(dp=2, dtype="bf16"), {"stage": 2}),
    (Cell(dp=2, dtype="bf16"), {"stage": 3}),
    (Cell(dp=2, dtype="bf16"), {"stage": 2, **OFFLOAD}),
    (Cell(dp=2, dtype="fp16"), {"stage": 2}),
    (Cell(dp=2, dtype="fp16"), {"stage": 3}),
]


def name(value):
    return str(value) if isinstance(value, Cell) else "-".join(f"{key}_{part}" for key, part in value.items())


@pytest.mark.parametrize(("cell", "zero"), CELLS, ids=name)
def test_deepspeed_trains_the_same_model(on_ranks, cell, zero):
    ours = put_together(on_ranks(cell.world, run_deepspeed, cell, zero, timeout=40))
    reference = put_together(on_ranks(cell.reference().world, run_native, cell.reference()))
    found = deviation(ours, reference)
    print(found)
    assert within(found, LIMITS["fp32" if cell.dtype == "fp32" else "bf16"]), found
