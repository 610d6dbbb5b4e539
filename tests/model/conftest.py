"""One device's mesh and stages for the model's tests."""

import dataclasses

import pytest
import torch

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
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
    def make(layers=None, has_embedding=True, has_head=True, dtype=torch.float32, recompute=None, **changes):
        config = make_config(**changes)
        return GPTStage(
            config,
            layers=range(config.num_layers) if layers is None else layers,
            has_embedding=has_embedding,
            has_head=has_head,
            mesh=mesh,
            rng=RngStreams(7, mesh.backend),
            seed=1234,
            dtype=dtype,
            recompute=recompute,
        )

    return make


@pytest.fixture
def make_batch():
    from megatron_lite.model.batch import MicroBatch

    def make(batch_size=2, length=16, vocab_size=101, **more):
        tokens = torch.randint(0, vocab_size, (batch_size, length + 1), generator=torch.Generator().manual_seed(5))
        return dataclasses.replace(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), **more)

    return make
