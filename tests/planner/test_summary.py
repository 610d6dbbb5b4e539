import itertools

from support.job_commands import BIG_RAMP, CURRICULUM, MULTILINGUAL, SMALL

from megatron_lite.config.arguments import parse_run
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.planner.summary import batch_stages, summarize


def summary(argv, world=None, vocabulary=50257):
    return summarize(with_vocabulary(parse_run(argv, world_size=world).config, vocabulary))


def test_the_big_ramp():
    result = summary(BIG_RAMP, 512)
    assert result.length.iterations == 311_541
    assert result.model.name == "13B"
    assert result.layout.dp == 64
    assert [stage.global_batch for stage in result.stages] == list(range(16, 1025, 16))
    assert result.stages[-1].last_iteration == 311_541
    assert result.saves.count == 311_541 // 1500
    assert (result.saves.first, result.saves.last) == (1500, 310_500)
    assert (result.length.warmup, result.length.decay, result.length.lr_unit) == (216_320, 126_953_125, "samples")


def test_replicas_idle_while_the_ramp_is_smaller_than_they_are():
    first = summary(BIG_RAMP, 512).stages[0]
    assert first.per_replica == (0, 1)
    assert first.replicas_without == 48
    assert first.idle == 0.75
    full = summary(BIG_RAMP, 512).stages[-1]
    assert full.per_replica == (16, 16)
    assert full.idle == 0


def test_the_stages_do_not_depend_on_the_layout():
    wide, narrow = (batch_stages(parse_run(BIG_RAMP, world_size=world).config) for world in (512, 8))
    assert [(stage.first_iteration, stage.global_batch) for stage in wide] == [
        (stage.first_iteration, stage.global_batch) for stage in narrow
    ]


def test_stages_join():
    stages = summary(MULTILINGUAL, 384, 250_680).stages
    for before, after in itertools.pairwise(stages):
        assert after.first_iteration == before.last_iteration + 1
        done = (before.last_iteration - before.first_iteration + 1) * before.global_batch
        assert after.first_sample == before.first_sample + done


def test_bloom():
    result = summary(MULTILINGUAL, 384, 250_680)
    assert result.length.iterations == 115_311
    assert result.model.name == "176B"
    assert [count for _, count in result.layout.stage_layers] == [5, *[6] * 10, 5]


def test_tokens_end_a_run_that_samples_do_not():
    result = summary(CURRICULUM, 64)
    assert result.length.tokens >= 100_000_000_000
    assert result.length.samples < 73_242_187
    assert result.stages[-1].last_iteration == result.length.iterations


def test_a_run_in_iterations():
    result = summary([*SMALL, "--lr-warmup-iters", "10"])
    assert result.length.iterations == 100
    assert result.length.samples == 800
    assert result.length.tokens == 800 * 32
    assert (result.length.warmup, result.length.decay, result.length.lr_unit) == (10, 100, "iterations")
    assert result.saves.count == 0
