"""Tests of the model state in device memory under DeepSpeed's ZeRO stages and offloading."""

import json

import pytest
from support.job_commands import SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.hardware import hardware
from megatron_lite.planner.memory import device_states, rank_memory
from megatron_lite.planner.search import search


def config_with(tmp_path, stage, **zero):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}}))
    flags = ["--bf16", "--deepspeed", "--deepspeed_config", str(path), "--engine", "deepspeed"]
    return with_vocabulary(parse_run([*SMALL, *flags], world_size=4).config, 1000)


def test_stages_divide_gradients_and_parameters(tmp_path):
    """The main parameters, 4 bytes for each trained one, are divided by the 4 replicas at every stage."""
    (one,), (two,) = (device_states(config_with(tmp_path, stage)) for stage in (1, 2))
    (three,) = device_states(config_with(tmp_path, 3, stage3_max_live_parameters=0))
    assert one["gradients"] == 2 * one["parameters"] == 4 * one["main parameters"]
    assert two == {**one, "gradients": one["gradients"] / 4}
    assert three == {**two, "parameters": one["parameters"] / 4}
    (gathered,) = device_states(config_with(tmp_path, 3, stage3_max_live_parameters=1000))
    assert gathered["parameters"] == three["parameters"] + 2 * 1000
    assert device_states(config_with(tmp_path, 3))[0]["parameters"] == one["parameters"], "all fit into the default"


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_offloaded_state_takes_no_device_memory(device, tmp_path):
    offloaded = {"device": device, **({"nvme_path": str(tmp_path)} if device == "nvme" else {})}
    (rank,) = rank_memory(config_with(tmp_path, 3, offload_optimizer=offloaded))
    assert rank.gradients == rank.optimizer == 0 < rank.weights
    both = {"offload_optimizer": offloaded, "offload_param": offloaded, "stage3_max_live_parameters": 0}
    assert rank_memory(config_with(tmp_path, 3, **both))[0].model_state == 0


def test_a_search_keeps_the_stage_of_the_command(tmp_path):
    found = search(config_with(tmp_path, 3), 1000, hardware("h100"))
    assert {layout.config.deepspeed.stage for layout in found.layouts} == {3}
    assert all(layout.config.parallel.distributed_optimizer for layout in found.layouts)
