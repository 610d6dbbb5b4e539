"""Tests of the parameter count check: uncounted and unnamed parameters of a stage are reported."""

import shlex

import pytest
import torch
from torch import nn

from megatron_lite.backend.environment import Launch
from megatron_lite.backend.select import select_backend
from megatron_lite.cli import rehearse
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.model import count_check
from megatron_lite.model.layer import MLP
from megatron_lite.parallel.layers import ColumnParallelLinear
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.tokenizer.vocabulary import fill_vocabulary
from megatron_lite.train.assemble import build_engine

WORDS = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --train-iters 5
    --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 62 --make-vocab-size-divisible-by 8 --device cpu
    """
)


def build(*words):
    config = fill_vocabulary(parse_run([*WORDS, *words]).config)[0]
    return build_engine(
        config, build_mesh(select_backend(config.runtime, ParallelConfig(), Launch()), ParallelConfig())
    )


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--swiglu --normalization RMSNorm --untie-embeddings-and-output-weights --disable-bias-linear --qk-layernorm",
        "--position-embedding-type alibi --embed-layernorm --group-query-attention --num-query-groups 2",
    ],
)
def test_supported_models_pass(words):
    build(*words.split())


def test_an_uncounted_layer_is_reported(monkeypatch):
    init = MLP.__init__

    def bigger(self, config, sharding):
        init(self, config, sharding)
        self.gate = ColumnParallelLinear(config.hidden_size, 8, sharding, bias=False)

    monkeypatch.setattr(MLP, "__init__", bigger)
    with pytest.raises(AssertionError) as caught:
        build()
    text = str(caught.value)
    assert "the layer 0 was built with 12,960 parameters, layer_layouts of megatron_lite/config/parameters.py" in text
    assert "lists 12,704" in text
    assert "\n  decoder.layers.0.mlp.gate.weight (8, 32): 256\n" in text


@pytest.mark.parametrize("part", ["embedding", "head"])
def test_embedding_and_head_are_checked(part, monkeypatch):
    monkeypatch.setattr(count_check, f"{part}_parameters", lambda model, rows: 7)
    with pytest.raises(AssertionError, match=f"the {part} was built with .*{part}_layouts"):
        build()


def test_parameters_without_a_global_name_are_reported(monkeypatch):
    init = MLP.__init__

    def bigger(self, config, sharding):
        init(self, config, sharding)
        self.scale = nn.Parameter(torch.ones(3))

    monkeypatch.setattr(MLP, "__init__", bigger)
    with pytest.raises(AssertionError, match=r"mlp\.scale \(3,\), decoder\.layers\.1\.mlp\.scale"):
        build()


@pytest.mark.slow
def test_a_rehearsal_checks_every_stage(monkeypatch, capsys):
    monkeypatch.setattr(count_check, "head_parameters", lambda model, rows: 7)
    words = [*WORDS, "--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2", "--world-size", "4"]
    assert rehearse.run(words) == 1
    assert "Internal error: the head was built with" in " ".join(capsys.readouterr().out.split())
