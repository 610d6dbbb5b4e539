"""Fixtures: a small GPT on one CPU device."""

import dataclasses

import pytest
import torch

from megatron_lite.backend.environment import Launch, read_launch
from megatron_lite.backend.group import LocalGroup
from megatron_lite.backend.select import select_backend
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.model.gpt import GPTStage
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.tensors import parameter_tensor
from megatron_lite.runs.manifest import Provenance
from megatron_lite.tokenizer.null import NullTokenizer


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def launch() -> Launch:
    return read_launch({})


@pytest.fixture(scope="session")
def make_config():
    def make(**model) -> RunConfig:
        shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
        # A wide initialisation: a model that prefers no token would hide a wrong position or key.
        shape |= {"vocab_size": 51, "padded_vocab_size": 64, "init_std": 0.3, "scaled_init": False}
        return RunConfig(
            model=ModelConfig(**(shape | model)),
            batch=BatchConfig(seq_length=16, micro_batch_size=1),
            tokenizer=TokenizerConfig(type="NullTokenizer", vocab_size=50),
            runtime=RuntimeConfig(device="cpu"),
        )

    return make


@pytest.fixture(scope="session")
def make_stage(make_config, launch):
    def make(**model):
        config = make_config(**model)
        backend = select_backend(config.runtime, ParallelConfig(), launch)
        stage = GPTStage(
            config, range(config.model.num_layers), build_mesh(backend, config.parallel), RngStreams(1, backend)
        )
        if config.model.position_embedding != "learned":
            return stage
        with torch.no_grad():  # positions that matter
            stage.embedding.position_embeddings.weight.normal_(generator=torch.Generator().manual_seed(3))
        return stage

    return make


@pytest.fixture(scope="session")
def stage(make_stage):
    return make_stage()


@pytest.fixture(scope="session")
def save(make_config):
    def save(root, stage, iteration=7, fingerprint=None, **config):
        tensors = [parameter_tensor(entry, write=True) for entry in stage.named_parameters_global()]
        stored = dataclasses.asdict(dataclasses.replace(make_config(), **config))
        prints = {"tokenizer": fingerprint or NullTokenizer(50).fingerprint()}
        save_checkpoint(SaveRequest(root, iteration, {}, Provenance(stored, prints)), tensors, LocalGroup("world"))
        return root

    return save


@pytest.fixture(scope="session")
def saved(tmp_path_factory, save, stage):
    return save(tmp_path_factory.mktemp("saved"), stage)
