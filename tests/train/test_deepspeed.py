"""DeepSpeed engine, as far as it can be tested without DeepSpeed; tests/deepspeed has the rest."""

import json
import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from support.job_commands import SMALL
from support.layout_matrix import VOCABULARY, Cell, sample
from torch import nn

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.arguments import parse_run
from megatron_lite.errors import ConfigError, TrainingError
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.train import deepspeed, deepspeed_swap
from megatron_lite.train.deepspeed import deepspeed_config, require_deepspeed
from megatron_lite.train.deepspeed_model import LossModel, LossScales, join_shared_parameters
from megatron_lite.train.deepspeed_swap import SwapFolders, prepare_swap


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed, which is not installed.*\[deepspeed\]"):
        require_deepspeed()


def test_settings_reach_deepspeed():
    argv = [*SMALL, "--engine", "deepspeed", "--zero-stage", "3", "--bf16", "--clip-grad", "0.5"]
    found = deepspeed_config(parse_run([*argv, "--bucket-megabytes", "4"], world_size=4).config, replicas=4)
    assert found["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 4 * 2**20 // 4}
    assert found["gradient_clipping"] == 0.5
    assert found["train_batch_size"] == 4 * found["train_micro_batch_size_per_gpu"]
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    automatic = ["--deepspeed-settings", '{"data_types": {"grad_accum_dtype": "auto"}}']
    found = deepspeed_config(parse_run([*argv, *automatic], world_size=4).config, replicas=4)
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.fixture
def swapping(tmp_path):
    """Return a function that prepares swapping to a folder (further entries of the sections); config and folders."""

    def prepare(optimizer=(), param=(), folder=tmp_path, load=lambda: None):
        place = {"device": "nvme", "nvme_path": str(folder)}
        zero = {"stage": 3, "offload_optimizer": place | dict(optimizer), "offload_param": place | dict(param)}
        settings = json.dumps({"zero_optimization": zero})
        argv = [*SMALL, "--engine", "deepspeed", "--deepspeed-settings", settings, "--vocab-size", "64"]
        config = parse_run(argv, world_size=1).config
        mesh = build_mesh(select_backend(config.runtime, config.parallel, Launch()), config.parallel)
        return config, prepare_swap(config, mesh, load)

    return prepare


def test_a_run_swaps_in_folders_of_its_own(swapping, tmp_path):
    config, ours = swapping({"pipeline_read": True})
    _, others = swapping()
    zero = deepspeed_config(config, 1, ours)["zero_optimization"]
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == ours.paths[str(tmp_path)]
    assert zero["offload_optimizer"]["buffer_count"] == 8
    assert zero["stage3_prefetch_bucket_size"] == 0
    assert ours.paths != others.paths
    ours.close()
    assert [str(path) for path in tmp_path.iterdir()] == list(others.paths.values())


def test_folders_of_killed_runs_are_removed(swapping, tmp_path):
    left = tmp_path / "megatron-lite-swap-rank0-killed"
    left.mkdir()
    (left / "lock").touch()
    (left / "1.tensor.swp").touch()
    _, ours = swapping()
    assert not left.exists()
    ours.close()


def test_folders_that_cannot_be_swapped_to(swapping, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Cannot write to nvme_path /proc/none.*or write \"device\": \"cpu\""):
        swapping(folder="/proc/none")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10_000))
    with pytest.raises(ConfigError, match=r"Swap files take about .* has 9.77 KiB free.*Free space there"):
        swapping()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_io(monkeypatch, tmp_path):
    def refuse(path, flags, mode):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(deepspeed_swap.os, "open", refuse)
    with pytest.raises(ConfigError, match=r"without direct I/O.*Give a folder on a local disk"):
        SwapFolders([str(tmp_path)], 0)


def test_buffers_that_are_too_small_or_cannot_be_locked(swapping, monkeypatch):
    with pytest.raises(
        ConfigError, match=r'buffer_size in the DeepSpeed JSON is 100 elements.*Write "buffer_size": \d'
    ):
        swapping(param={"buffer_size": 100})
    monkeypatch.setattr(deepspeed_swap, "_lock_limit", lambda: 8 * 2**10)
    with pytest.raises(
        ConfigError, match=r"swap buffers take .* of locked memory.*may lock 8 KiB.*ulimit -l unlimited"
    ):
        swapping()


def test_buffers_hold_the_padded_vocabulary(swapping):
    config, ours = swapping()
    padded = config.model.padded_vocab_size * config.model.hidden_size
    assert deepspeed_config(config, 2, ours)["zero_optimization"]["offload_param"]["buffer_size"] >= padded / 2
    ours.close()


def test_a_model_that_cannot_be_built_leaves_no_files(swapping, tmp_path, monkeypatch):
    config, ours = swapping()
    mesh = build_mesh(select_backend(config.runtime, config.parallel, Launch()), config.parallel)
    monkeypatch.setattr(deepspeed, "_import_deepspeed", lambda mesh: None)
    monkeypatch.setattr(deepspeed, "prepare_swap", lambda *_: ours)
    monkeypatch.setattr(deepspeed, "_build", lambda *_: {}["model"])
    with pytest.raises(KeyError):
        deepspeed.build_deepspeed_engine(config, mesh)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_operator_is_an_error_with_its_remedies(swapping, tmp_path):
    def load():
        raise RuntimeError("Unable to JIT load the async_io op")

    with pytest.raises(ConfigError, match=r"cannot be loaded: Unable to JIT.*libaio-dev.*DS_BUILD_AIO=1.*cpu"):
        swapping(load=load)
    assert list(tmp_path.iterdir()) == []


def test_a_swap_file_that_is_too_short(tmp_path):
    (tmp_path / "1.tensor.swp").write_bytes(bytes(8))
    with pytest.raises(TrainingError, match=r"has 8 bytes instead of 16: its disk is full.*Free space there"):
        deepspeed_swap._require_size(str(tmp_path / "1.tensor.swp"), 16)


@pytest.mark.parametrize("model", ["gpt2", "albert"])
def test_the_loss_is_differentiated_by_autograd(model):
    """Gradients equal those of the logits' cross-entropy, also of a tied table and of shared layers."""
    config = Cell(model=model, layers=2).config()
    mesh = build_mesh(select_backend(config.runtime, config.parallel, Launch()), config.parallel)
    stage = GPTStage(config, range(2), mesh, RngStreams(1, mesh.backend))
    parameters = join_shared_parameters(stage)
    assert not any(parameter.aliases for parameter in parameters)
    tokens = torch.from_numpy(np.stack([sample(0), sample(1)]))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:])
    scaled, samples = LossModel(stage)(batch, LossScales(0.5, 4.0))
    (scaled * 4.0).backward()
    ours = [parameter.param.grad for parameter in parameters]
    stage.zero_grad()
    logits = stage.logits(None, batch)[..., :VOCABULARY]
    losses = nn.functional.cross_entropy(logits.permute(1, 2, 0), batch.labels, reduction="none").mean(1)
    (losses.sum() * 0.5 * 4.0).backward()
    assert torch.allclose(samples, losses, rtol=1e-5)
    for gradient, parameter in zip(ours, parameters, strict=True):
        expected = parameter.param.grad
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3), parameter.name
