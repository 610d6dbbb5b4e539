"""Tests of the planner's weights, gradients and optimizer state: equal to those of the engine, byte for byte."""

import random
from typing import get_args

import pytest

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.layout import coordinates
from megatron_lite.config.optimizer import OptimizerKind
from megatron_lite.config.parameters import parameter_layouts
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.planner.memory import rank_memory
from megatron_lite.planner.model_state import state_bytes
from megatron_lite.rehearsal.dry_run import RehearsalBackend
from megatron_lite.train.assemble import build_engine

pytestmark = pytest.mark.slow

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 48"
BATCH = "--micro-batch-size 1 --global-batch-size 64 --train-iters 10 --lr 1e-3 --make-vocab-size-divisible-by 8"
LLAMA = "--position-embedding-type rotary --swiglu --normalization RMSNorm --num-query-groups 2 --disable-bias-linear"
MODELS = (
    "",
    f"{LLAMA} --group-query-attention --untie-embeddings-and-output-weights --qk-layernorm",
    "--position-embedding-type alibi --embed-layernorm --squared-relu",
    "--share-layers all --embedding-size 16",
    "--share-layers mlp --activation geglu",
    "--share-layers 2 --add-qkv-bias --disable-bias-linear",
)
LAYOUTS = (
    "",
    "--pipeline-model-parallel-size 2",
    "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
    "--pipeline-model-parallel-size 4 --pipeline-schedule zb-h1",
    "--pipeline-model-parallel-size 2 --pipeline-schedule zb-v",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
)
MORE = (
    "--bf16",
    "--fp16 --ema-decay 0.9",
    "--ema-decay 0.9",
    "--freeze embedding mlp.fc1 --bf16",
    "--lr-factors norm=0.5 layers.0=2",
    "--bf16 --fp8-format hybrid --fp8-amax-history-len 4 --first-last-layers-bf16",
)


def run_config(arguments, world_size):
    config = parse_run([*SIZES.split(), *BATCH.split(), *arguments.split()], world_size=world_size).config
    return with_vocabulary(config, 123)


def engine_of(config, rank):
    return build_engine(config, build_mesh(RehearsalBackend(rank, config.parallel.world_size), config.parallel))


@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_the_state_of_random_layouts_equals_that_of_the_engine(kind):
    choose = random.Random(kind)
    for _ in range(8):
        tp, dp = choose.choice((1, 2, 4)), choose.choice((1, 2, 3))
        parts = [choose.choice(MODELS), choose.choice(LAYOUTS), choose.choice(MORE), f"--optimizer {kind}"]
        parts += [choose.choice(("", "--use-distributed-optimizer")), f"--tensor-model-parallel-size {tp}"]
        parts += [f"--bucket-megabytes {choose.choice((1, 160))}"]
        words = " ".join(parts).split()
        pp = int(words[words.index("--pipeline-model-parallel-size") + 1]) if "pipeline-model" in parts[1] else 1
        try:
            config = run_config(" ".join(parts), tp * pp * dp)
        except ConfigError:
            continue
        for rank in choose.sample(range(config.parallel.world_size), min(6, config.parallel.world_size)):
            at = coordinates(rank, config.parallel)
            assert state_bytes(config, at) == engine_of(config, rank).state_bytes(), (" ".join(parts), at)


@pytest.mark.parametrize("arguments", MODELS)
def test_the_parameter_table_is_that_of_the_model(arguments):
    config = run_config(arguments, 1)
    found = {p.name: (p.global_shape, p.tp_dim) for p in engine_of(config, 0).buffers.parameters}
    assert {name: tuple(layout) for name, layout in parameter_layouts(config.model).items()} == found
    assert list(found) == list(parameter_layouts(config.model)), "the order of the model"


def test_the_first_rank_of_each_pipeline_rank_is_reported():
    config = run_config("--bf16 --pipeline-model-parallel-size 2 --use-distributed-optimizer --ema-decay 0.9", 4)
    for rank in rank_memory(config):
        state = state_bytes(config, {"tp": 0, "cp": 0, "dp": 0, "pp": rank.pp_rank})
        assert (rank.weights, rank.gradients) == (state["parameters"], state["gradients"])
        assert rank.optimizer == state["main parameters"] + state["moments"] + state["average"]
        assert rank.total == rank.model_state + rank.working + rank.slack
