"""Tests of the step time and of the parts that it is made of."""

from dataclasses import replace

import pytest
from support.job_commands import BIG_RAMP, CURRICULUM, LLAMA, MULTILINGUAL, SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.bubble import pipeline_seconds
from megatron_lite.planner.communication import Axis
from megatron_lite.planner.compute import product_seconds
from megatron_lite.planner.hardware import hardware
from megatron_lite.planner.step_time import PARTS, step_time_of
from megatron_lite.schedules.batch_size import global_batch_size
from megatron_lite.schedules.length import iteration_at
from megatron_lite.schedules.lowering import lower
from megatron_lite.schedules.pipeline import pipeline_schedule
from megatron_lite.schedules.sequence_length import sequence_length
from megatron_lite.schedules.simulate import Costs, simulate

A100, H100 = hardware("a100"), hardware("h100")


def config_of(argv, world, vocabulary=50257):
    return with_vocabulary(parse_run(argv, world_size=world).config, vocabulary)


def step_time(config, machine, consumed_samples):
    batch = global_batch_size(config.batch, consumed_samples, config.parallel.dp)
    length = sequence_length(config.batch, iteration_at(config, consumed_samples))
    return step_time_of(config, machine, batch, length)


def test_parts_sum_to_the_total():
    found = step_time(config_of(MULTILINGUAL, 384, 250_680), A100, 200_000_000)
    assert list(found.parts) == list(PARTS)
    assert found.total == pytest.approx(sum(found.parts.values()))
    assert found.microbatches == 128 and found.tokens == 2048 * 2048
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert found.hardware_flops / found.model_flops == pytest.approx(4 / 3, rel=0.02)
    assert 0.2 < found.recompute / (found.matmul + found.attention + found.elementwise) < 0.34, "without the head"


def test_ramp_up_and_curriculum_determine_batch_and_length():
    config = config_of(BIG_RAMP, 256)
    first, last = step_time(config, A100, 0), step_time(config, A100, 200_000_000)
    assert (first.tokens, last.tokens) == (16 * 2048, 1024 * 2048)
    assert first.microbatches == 1 and last.microbatches == 32
    short = step_time(config_of(CURRICULUM, 64), A100, 0)
    assert short.tokens == 32 * 64


def test_model_flops_are_those_of_the_throughput():
    config = config_of(LLAMA, 64, 128256)
    found = step_time_of(config, H100, 128, 8192)
    assert found.model_flops == found.hardware_flops, "nothing is recomputed"
    assert 0.2 < found.model_flops_per_second / 989e12 < 0.8


def test_a_product_loses_the_rest_of_its_last_wave():
    # 132 multiprocessors: 132 tiles of 256 x 128 are one wave, one more column of tiles is a second.
    full = product_seconds(H100, "bf16", 256 * 12, 128 * 11, 4096)
    more = product_seconds(H100, "bf16", 256 * 12, 128 * 12, 4096)
    flops = 2 * 256 * 12 * 128 * 11 * 4096
    assert flops / full / 989e12 > 0.6
    assert more / full > 1.2


def test_a_small_product_takes_the_time_of_its_traffic():
    found = product_seconds(H100, "bf16", 8, 8192, 8192)
    assert found == pytest.approx((8 * 8192 * 2 + 8192 * 8192) * 2 / H100.memory_rate, rel=0.2)


def test_sizes_without_alignment_are_slow():
    assert product_seconds(A100, "bf16", 4096, 4095, 4096) > 1.5 * product_seconds(A100, "bf16", 4096, 4096, 4096)
    assert product_seconds(A100, "fp32", 4096, 4095, 4096) < 1.1 * product_seconds(A100, "fp32", 4096, 4096, 4096)


def test_rings_within_and_across_nodes():
    inside, across = Axis(8, 1, A100), Axis(8, 8, A100)
    assert not inside.crosses_nodes and across.crosses_nodes
    assert inside.all_gather(1e9) == pytest.approx(7 / 8 * 1e9 / A100.link_rate, rel=0.05)
    assert across.all_gather(1e9) == pytest.approx(7 / 8 * 1e9 / A100.network_rate, rel=0.05)
    assert inside.all_reduce(1e9) == 2 * inside.all_gather(1e9)
    # With 4 ranks of the group in a node, 4 ports carry the ring.
    assert Axis(16, 2, A100).rate == pytest.approx(4 * A100.network_rate)
    assert Axis(1, 1, A100).all_reduce(1e9) == 0


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "zb-h1", "zb-v", "interleaved"])
def test_the_duration_is_that_of_the_simulation(kind):
    chunks = 2 if kind in ("interleaved", "zb-v") else 1
    for comm, tolerance in ((0.0, 0.02), (0.05, 0.03)):
        costs = Costs(forward=1.0, backward=1.1, weight=0.9, comm=comm, stages=(1.0,) * (4 * chunks - 1) + (1.25,))
        for microbatches in (1, 3, 16, 24, 33):
            schedule = pipeline_schedule(kind, 4, microbatches, chunks)
            whole = simulate(lower(schedule, kind, chunks, costs), costs).makespan
            found = pipeline_seconds(kind, 4, microbatches, chunks, costs)
            # Beyond 16 micro-batches it is extrapolated.
            assert found == pytest.approx(whole, rel=tolerance if microbatches <= 16 else 0.03), microbatches


def test_thousands_of_stages_are_not_simulated():
    costs = Costs(forward=1.0, backward=1.0, weight=1.0, comm=0.25)
    assert pipeline_seconds("1f1b", 4096, 100_000, 1, costs) == 3 * 100_000 + 3.5 * 4095


def test_the_bubble_of_1f1b_is_the_formula():
    config = config_of([*BIG_RAMP, "--pp-partition-method", "uniform"], 256)
    found = step_time_of(config, A100, 1024, 2048)
    work = found.total - found.bubble - found.pipeline - found.data_parallel - found.optimizer
    # (p - 1) / m of the work, less where other stages are faster than the last one.
    assert 0.5 * 3 / 32 < found.bubble / work <= 3 / 32 + 1e-3


def test_zero_bubble_schedules_have_less_bubble():
    config = config_of(BIG_RAMP, 256)
    zero = replace(config, parallel=replace(config.parallel, pipeline_schedule="zb-h1"))
    assert step_time_of(zero, A100, 1024, 2048).bubble < 0.7 * step_time_of(config, A100, 1024, 2048).bubble


def test_sequence_parallelism_and_zero1_change_their_parts():
    config = config_of(BIG_RAMP, 256)
    split = replace(config, parallel=replace(config.parallel, sequence_parallel=True))
    whole, parted = (step_time_of(one, A100, 1024, 2048) for one in (config, split))
    assert parted.elementwise < whole.elementwise
    replicated = replace(config, parallel=replace(config.parallel, distributed_optimizer=False))
    assert step_time_of(replicated, A100, 1024, 2048).optimizer == pytest.approx(32 * whole.optimizer)


def test_shared_and_frozen_parameters_are_neither_reduced_nor_updated():
    whole = step_time_of(config_of(SMALL, 8, 1000), A100, 8, 32)
    for more in (["--share-layers", "all"], ["--freeze", "layers"]):
        fewer = step_time_of(config_of([*SMALL, *more], 8, 1000), A100, 8, 32)
        assert fewer.optimizer < 0.6 * whole.optimizer and fewer.data_parallel < whole.data_parallel


def test_tensor_parallelism_over_nodes_is_slower():
    config = config_of(BIG_RAMP, 256)
    small = hardware("a100", per_node=1)
    inside, across = (step_time_of(config, machine, 1024, 2048).tensor_parallel for machine in (A100, small))
    assert across > 5 * inside


def test_a_single_rank_has_neither_communication_nor_bubble():
    found = step_time_of(config_of(SMALL, 1, 1000), A100, 8, 32)
    alone = ("tensor_parallel", "context_parallel", "pipeline", "bubble", "data_parallel")
    assert [found.parts[name] for name in alone] == [0] * 5


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lion", "adafactor", "muon", "adamw8bit"])
def test_every_optimizer_has_a_time(optimizer):
    assert step_time_of(config_of([*SMALL, "--optimizer", optimizer], 1, 1000), A100, 8, 32).optimizer > 0


def test_a_ring_hides_the_exchange_of_keys_and_values():
    config = config_of(LLAMA, 64, 128256)
    found = {}
    for kind in ("p2p", "all_gather"):
        split = replace(config, parallel=replace(config.parallel, cp=4, cp_comm_type=kind))
        found[kind] = step_time_of(split, H100, 128, 8192)
    assert found["p2p"].context_parallel < 0.1 * found["all_gather"].context_parallel
    whole = step_time_of(config, H100, 128, 8192)
    # A quarter of each sequence on a rank, and four times the micro-batches for each replica.
    assert found["p2p"].attention == pytest.approx(whole.attention, rel=0.05)
