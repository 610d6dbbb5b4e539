"""Tests of the job plan: equal to a plain loop over the iterations, for random schedules."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.job_commands import BIG_RAMP, SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.checkpoint import CheckpointConfig, SavePhase
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.disk import storage_of
from megatron_lite.planner.hardware import hardware
from megatron_lite.planner.job import Assumptions, evaluations, plan_job
from megatron_lite.planner.nodes import even_nodes, node_counts
from megatron_lite.runs.retention import expired, retention_of
from megatron_lite.schedules.iteration import plan_iteration
from megatron_lite.schedules.length import is_finished
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.saves import is_save_iteration, is_weights_iteration

A100 = hardware("a100")


def config_of(argv, world=1, vocabulary=1000):
    return with_vocabulary(parse_run(argv, world_size=world).config, vocabulary)


BASE = config_of(SMALL)


@st.composite
def runs(draw):
    """Draw a short run with ramp-up, curriculum, save phases and retention."""
    argv = ["--global-batch-size", "8"]
    if draw(st.booleans()):
        argv += ["--rampup-batch-size", "2", "2", str(draw(st.integers(1, 120)))]
    if draw(st.booleans()):
        argv += ["--seq-length-warmup", f"{draw(st.sampled_from([8, 16]))}:{draw(st.integers(1, 40))}:8"]
    if draw(st.booleans()):
        argv += ["--train-samples", str(draw(st.integers(8, 400)))]
    else:
        argv += ["--train-iters", str(draw(st.integers(1, 60)))]
    if draw(st.booleans()):
        argv += ["--train-tokens", str(draw(st.integers(300, 12_000)))]
    phases = [SavePhase(interval=draw(st.integers(1, 9)), until=draw(st.integers(1, 30)))] * draw(st.integers(0, 1))
    phases += [SavePhase(interval=draw(st.integers(1, 12)))]
    checkpoint = CheckpointConfig(
        save="run",
        phases=tuple(phases),
        keep_last=draw(st.sampled_from([0, 1, 3])),
        weights_only_every=draw(st.sampled_from([0, 4])),
        save_optimizer=draw(st.booleans()),
    )
    if checkpoint.keep_last:
        checkpoint = replace(checkpoint, keep_every=draw(st.sampled_from([0, 5])))
    length = [] if "--train-samples" not in argv else ["--train-iters"]
    base = [
        word for place, word in enumerate(SMALL) if not (length and SMALL[place - (word == "100")] == "--train-iters")
    ]
    return replace(config_of([*base, *argv]), checkpoint=checkpoint)


def simulated(config):
    """Return progress, saves, the most checkpoints that exist at once, and weights-only saves of a plain loop."""
    progress, saves, kept, most, weights = Progress(), [], [], 0, 0
    while not is_finished(config, progress):
        plan = plan_iteration(config, progress)
        progress = progress.advance(plan.global_batch, plan.tokens, applied=True)
        iteration, last = progress.iteration, is_finished(config, progress)
        weights += is_weights_iteration(config.checkpoint, iteration)
        if is_save_iteration(config.checkpoint, iteration) or last:
            saves.append(iteration)
            kept.append(iteration)
            most = max(most, len(kept))
            gone = expired(kept, iteration, retention_of(config.checkpoint))
            kept = [number for number in kept if number not in gone]
    return progress, saves, most, weights


@given(runs())
@settings(max_examples=60, deadline=None)
def test_the_plan_is_that_of_a_plain_loop(config):
    progress, saves, most, weights = simulated(config)
    if not progress.iteration:
        return
    job = plan_job(config, A100, Assumptions())
    assert job.iterations == progress.iteration
    assert job.samples == progress.consumed_train_samples
    assert job.tokens == progress.consumed_train_tokens
    storage = job.storage
    assert storage.saves == len(saves) and storage.weights_only == weights
    assert storage.written == len(saves) * storage.checkpoint + weights * storage.weights
    assert storage.kept in (most, most + 1), "one more while the last is written"
    assert [(stage.first_iteration, stage.last_iteration) for stage in job.stages][-1][1] == progress.iteration
    assert sum(stage.iterations * stage.global_batch for stage in job.stages) == job.samples
    assert sum(stage.iterations * stage.step.tokens for stage in job.stages) == job.tokens
    assert job.seconds["training"] == pytest.approx(sum(stage.iterations * stage.step.total for stage in job.stages))


def test_the_first_bigscience_model():
    job = plan_job(config_of(BIG_RAMP, 256, 50257), hardware("v100", per_node=4), Assumptions())
    assert job.iterations == 311_541 and job.nodes == 64
    assert job.stages[-1].first_iteration - 1 == 23_456
    assert job.samples == 299_999_568
    assert len(job.stages) == 64
    assert job.total_seconds == sum(job.seconds.values())
    assert job.storage.saves == 311_541 // 1500 + 1
    assert job.classic_seconds == pytest.approx(
        8 * job.tokens * 12_853_386_240 / (256 * job.final.hardware_flops_per_second)
    )


def test_skipped_iterations_take_no_time():
    config = config_of([*SMALL, "--skip-train-iteration-range", "11-20"])
    whole, skipping = (plan_job(one, A100, Assumptions()) for one in (BASE, config))
    assert skipping.seconds["training"] == pytest.approx(0.9 * whole.seconds["training"])
    assert skipping.iterations == whole.iterations


def test_evaluations_are_counted():
    # Every 30 iterations and at the end, validation and test.
    more = ["--eval-interval", "30", "--eval-iters", "7", "--split", "90,5,5"]
    assert evaluations(config_of([*SMALL, *more])) == 7 * (3 + 1 + 1)
    assert evaluations(config_of([*SMALL, *more, "--split", "100,0,0"])) == 0
    assert evaluations(config_of([*SMALL, *more, "--ema-decay", "0.9"])) == 2 * 7 * 5


def test_saves_block_less_in_the_background():
    saving = ["--save", "run", "--save-interval", "10"]
    waiting, hidden = (
        plan_job(config_of([*SMALL, *saving, *more]), A100, Assumptions(write_rate=1e6))
        for more in ([], ["--async-save"])
    )
    assert waiting.blocking_seconds == waiting.save_seconds == hidden.save_seconds
    assert hidden.blocking_seconds < 0.01 * waiting.blocking_seconds
    assert waiting.between_saves == pytest.approx(10 * waiting.final.total)
    unsaved = plan_job(BASE, A100, Assumptions())
    assert unsaved.between_saves == inf and unsaved.seconds["failures"] == 0


def test_time_limits_make_jobs():
    long = replace(BASE, training=replace(BASE.training, train_iters=10**7))
    job = plan_job(long, A100, Assumptions(job_seconds=3600, restart_seconds=60))
    useful = job.seconds["training"] + job.seconds["evaluation"] + job.seconds["saves"]
    assert job.jobs == -(-useful // 3600)
    assert job.seconds["job starts"] == 60 * job.jobs


def test_cost_follows_power_and_price():
    job = plan_job(BASE, A100, Assumptions(pue=1.5, carbon=100, price=2))
    hours = job.total_seconds / 3600
    assert job.cost.device_hours == pytest.approx(hours)
    assert job.cost.megawatt_hours == pytest.approx(hours * 400 * 1.5 / 1e6)
    assert job.cost.tons_of_co2 == pytest.approx(job.cost.megawatt_hours * 0.1)
    assert job.cost.price == pytest.approx(2 * hours)
    assert plan_job(BASE, A100, Assumptions()).cost.price is None


def test_node_counts_over_the_ramp_up():
    config, machine = config_of(BIG_RAMP, 256, 50257), hardware("v100", per_node=4)
    # Batches are multiples of 16: 16 replicas of 8 ranks divide all of them.
    assert even_nodes(config, machine, 128) == [2, 4, 8, 16, 32]
    found = {count.nodes: count for count in node_counts(config, machine, [2, 4, 8, 16, 32])}
    assert list(found) == [16, 32, 64, 128, 256]
    assert found[32].even and not found[64].even and found[64].idle > 0
    assert found[16].seconds > found[32].seconds > found[64].seconds
    assert found[64].device_hours == pytest.approx(256 * found[64].seconds / 3600)


def test_storage_after_a_resume():
    config = config_of([*SMALL, "--save", "run", "--save-interval", "10", "--keep-last", "3"])
    assert storage_of(config, []).saves == 10
    assert storage_of(config, [30, 40]).saves == 6
    assert storage_of(config, [100]).saves == 0
