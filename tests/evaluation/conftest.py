"""Fixtures: a small GPT on one CPU device."""

import pytest
import torch

from megatron_lite.backend.environment import read_launch
from megatron_lite.backend.select import select_backend
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.evaluation.scoring import Scorer
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams

VOCAB = 51


@pytest.fixture(scope="session")
def small_config():
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=64,
            vocab_size=VOCAB,
            padded_vocab_size=64,
            init_std=0.3,
        ),
        batch=BatchConfig(seq_length=16, micro_batch_size=1),
        runtime=RuntimeConfig(device="cpu", num_threads=1),
    )


@pytest.fixture(scope="session")
def make_scorer(small_config):
    """Return a function that makes a scorer of the same small model."""
    backend = select_backend(small_config.runtime, small_config.parallel, read_launch({}))
    mesh = build_mesh(backend, small_config.parallel)
    stage = GPTStage(small_config, range(2), mesh, RngStreams(1, backend))

    def make(batch_size=4):
        return Scorer(stage, mesh, batch_size)

    return make


@pytest.fixture(scope="session")
def text():
    return torch.randint(VOCAB, (47,), generator=torch.Generator().manual_seed(0)).numpy()
