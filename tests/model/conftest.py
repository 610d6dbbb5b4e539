"""Fixtures: mesh, model stages and micro-batches on one device."""

import dataclasses

import pytest
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.optimizer import PrecisionConfig, RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mesh():
    return build_mesh(select_backend(RuntimeConfig(device="cpu"), ParallelConfig(), Launch()), ParallelConfig())


@pytest.fixture
def make_config():
    def make(**changes):
        sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 48}
        sizes |= {"vocab_size": 101, "padded_vocab_size": 128, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        return ModelConfig(**(sizes | changes))

    return make


@pytest.fixture
def make_stage(mesh, make_config):
    def make(layers=None, dtype="fp32", recompute=None, **changes):
        model = make_config(**changes)
        config = RunConfig(
            model=model,
            batch=BatchConfig(seq_length=48, micro_batch_size=1),
            precision=PrecisionConfig(dtype=dtype),
            recompute=recompute or RecomputeConfig(),
        )
        return GPTStage(config, layers or range(model.num_layers), mesh, RngStreams(7, mesh.backend))

    return make


@pytest.fixture
def make_batch():
    from megatron_lite.model.batch import MicroBatch

    def make(batch_size=2, length=16, vocab_size=101, **more):
        tokens = torch.randint(0, vocab_size, (batch_size, length + 1), generator=torch.Generator().manual_seed(5))
        return dataclasses.replace(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), **more)

    return make
