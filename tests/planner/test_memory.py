"""Tests of the memory of the model state."""

import pytest

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.memory import model_state_bytes

SIZES = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
BATCH = "--micro-batch-size 1 --global-batch-size 64 --train-iters 10 --lr 1e-3 --make-vocab-size-divisible-by 1"


def memory(more, world_size):
    parsed = parse_run([*SIZES.split(), *BATCH.split(), *more.split()], world_size=world_size)
    config = with_vocabulary(parsed.config, 1024)
    return model_state_bytes(config), parameter_count(config.model)


def test_one_rank_holds_everything():
    found, parameters = memory("", 1)
    assert found == parameters * (4 + 4 + 8)
    found, parameters = memory("--bf16", 1)
    assert found == parameters * (2 + 4 + 12)


def test_the_optimizer_state_is_divided_over_replicas():
    found, parameters = memory("--bf16 --use-distributed-optimizer", 4)
    assert found == parameters * 6 + -(-parameters * 12 // 4)


def test_tensor_and_pipeline_parallelism_divide_the_parameters():
    whole, _ = memory("--bf16", 1)
    half, _ = memory("--bf16 --tensor-model-parallel-size 2", 2)
    assert half == pytest.approx(whole / 2, rel=1e-4)
    staged, _ = memory("--bf16 --pipeline-model-parallel-size 2 --pp-partition-method uniform", 2)
    assert staged > whole / 2, "both ends hold the tied embedding"
    interleaved, _ = memory("--bf16 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", 2)
    assert interleaved == staged


@pytest.mark.parametrize(
    ("flags", "moments"),
    [
        ("--optimizer sgd", 4),
        ("--optimizer sgd --sgd-momentum 0", 0),
        ("--optimizer lion", 4),
        ("--optimizer lion --ema-decay 0.9", 8),
        ("--optimizer adafactor", 0),
        ("--optimizer adafactor --adafactor-beta1 0.9", 4),
        ("--optimizer adamw8bit", 2 + 8 / 256),
    ],
)
def test_each_optimizer_has_its_moments(flags, moments):
    found, parameters = memory(flags, 1)
    assert found == int(parameters * (4 + 4 + moments))


def test_muon_has_one_moment_in_layers_and_two_elsewhere():
    found, parameters = memory("--optimizer muon", 1)
    elsewhere = (1024 + 32) * 64 + 2 * 64
    assert found == parameters * (4 + 4 + 4) + 4 * elsewhere


def test_a_pipeline_divides_shared_layers_no_further():
    _, whole = memory("", 1)
    _, shared = memory("--share-layers all", 1)
    found, parameters = memory("--share-layers all --pipeline-model-parallel-size 2", 2)
    layer = (whole - shared) // 7
    # The first rank has the positions, the last the final norm and the copy of the tied table.
    assert parameters == shared
    assert found == (layer + 64 * (1024 + 32)) * 16
