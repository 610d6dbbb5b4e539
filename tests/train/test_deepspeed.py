"""DeepSpeed engine, as far as it can be tested without DeepSpeed; tests/deepspeed has the rest."""

import sys

import numpy as np
import pytest
import torch
from support.job_commands import SMALL
from support.layout_matrix import VOCABULARY, Cell, sample
from torch import nn

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.arguments import parse_run
from megatron_lite.errors import ConfigError
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.train.deepspeed import deepspeed_config, require_deepspeed
from megatron_lite.train.deepspeed_model import LossModel, LossScales, join_shared_parameters


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
