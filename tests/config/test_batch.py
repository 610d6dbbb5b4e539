"""Rules of the batch at their boundaries: what is just allowed, and what is just refused and why."""

from dataclasses import replace

import pytest
from support.job_commands import SMALL

from megatron_lite.config import batch as rules
from megatron_lite.config import curriculum_rules
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.batch import Rampup, SequenceRamp
from megatron_lite.config.command_line import read_command_line
from megatron_lite.config.given import Given

CONFIG = parse_run(SMALL).config  # sequences of 32 tokens, micro-batches of 2, a global batch of 8


def errors(rule, *, parallel=None, **changes):
    """Text of each error that the rule finds in CONFIG with some fields of its batch (and parallel) section changed."""
    config = replace(
        CONFIG, batch=replace(CONFIG.batch, **changes), parallel=replace(CONFIG.parallel, **(parallel or {}))
    )
    return [str(error) for error in rule(config)]


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ("--seq-length 1 --micro-batch-size 1 --global-batch-size 0 --max-position-embeddings 1", []),
        ("--seq-length 0", ["--seq-length 0 is out of range"]),
        ("--micro-batch-size 0", ["--micro-batch-size 0 is out of range"]),
        ("--global-batch-size -1", ["--global-batch-size -1 is out of range"]),
        ("--seq-length -1 --micro-batch-size -1", ["--seq-length -1", "--micro-batch-size -1"]),
    ],
)
def test_sizes_are_positive(extra, found):
    given = Given()
    read_command_line([*SMALL, *extra.split()], given)
    texts = [str(error) for error in given.errors]
    assert len(texts) == len(found) and all(part in text for part, text in zip(found, texts, strict=True)), texts


def test_the_micro_batch_divides_the_batch():
    assert errors(rules.microbatch_divides_batch, micro_batch_size=8) == []
    (text,) = errors(rules.microbatch_divides_batch, micro_batch_size=3)
    assert "--global-batch-size 8, --micro-batch-size 3" in text


def test_the_micro_batches_of_a_replica_have_a_bound():
    def found(micro_batches, **changes):
        sizes = {"micro_batch_size": 2, "global_batch_size": 6 * micro_batches}
        return errors(rules.microbatches_can_be_listed, parallel={"world_size": 3}, **sizes | changes)

    most = rules.MAX_MICRO_BATCHES
    assert found(most) == []
    assert found(most, step_schedule=((0, 6 * most), (9, 6))) == []
    for texts in (found(most + 1), found(1, step_schedule=((0, 6 * most + 6), (9, 6)))):
        (text,) = texts
        assert "1,000,001 micro-batches" in text and "the limit is 1,000,000 " in text
        assert "--global-batch-size 6000006, --micro-batch-size 2, 3 replicas" in text


ORDER, REACH, WHOLE = (
    "must be at least 1",
    "does not reach the global batch",
    "Cannot split every batch of the ramp-up",
)


@pytest.mark.parametrize(
    ("ramp", "found"),
    [
        ((2, 2, 100), []),
        ((2, 2, 0), []),  # over at once
        ((8, 2, 100), []),  # begins where it ends
        ((2, 6, 100), []),  # one step
        ((0, 2, 100), [ORDER]),
        ((2, 0, 100), [ORDER]),
        ((2, 2, -1), [ORDER]),
        ((10, 2, 100), ["above the global batch of 8"]),
        ((2, 4, 100), [REACH]),
        ((4, 8, 100), [REACH]),
        ((1, 7, 100), [WHOLE]),  # neither start nor increment
        ((1, 1, 100), [WHOLE]),
        ((5, 3, 100), [WHOLE]),
        ((3, 2, 100), [REACH, WHOLE]),
        ((2, 3, 100), [WHOLE]),
    ],
    ids=str,
)
def test_ramps(ramp, found):
    start, increment, samples = ramp
    texts = errors(rules.rampup_reaches_the_batch, rampup=Rampup(start=start, increment=increment, samples=samples))
    assert len(texts) == len(found) and all(part in text for part, text in zip(found, texts, strict=True)), texts
    assert all(f"--rampup-batch-size {start} {increment} {samples}" in text for text in texts)


def test_a_ramp_in_steps_of_one_needs_micro_batches_of_one():
    ramp = Rampup(start=1, increment=1, samples=100)
    assert errors(rules.rampup_reaches_the_batch, rampup=ramp, micro_batch_size=1) == []


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((2, 8), []),
        ((8,), []),
        ((3, 8), ["batches 3 of --step-batch-size-schedule into micro-batches of 2 (--micro-batch-size 2)"]),
        ((0, 8), ["batches 0 of"]),
        ((-2, 8), ["batches -2 of"]),
        ((8, 2), ["--global-batch-size 8 differs from the last batch of --step-batch-size-schedule, 2"]),
        ((2, 7), ["batches 7", "--step-batch-size-schedule, 7"]),
    ],
    ids=str,
)
def test_step_schedules(sizes, found):
    schedule = tuple((100 * place, size) for place, size in enumerate(sizes))
    texts = errors(rules.step_schedule_is_whole, step_schedule=schedule)
    assert len(texts) == len(found) and all(part in text for part, text in zip(found, texts, strict=True)), texts
    assert errors(rules.step_schedule_is_whole) == []


def test_a_batch_of_one_may_be_a_step():
    assert errors(rules.step_schedule_is_whole, step_schedule=((0, 1), (5, 8)), micro_batch_size=1) == []


@pytest.mark.parametrize("ramped", [False, True])
@pytest.mark.parametrize("decreased", [False, True])
def test_a_step_schedule_excludes_other_schedules(ramped, decreased):
    others = {"rampup": Rampup(start=2, increment=2, samples=9) if ramped else None, "decrease_if_needed": decreased}
    assert errors(rules.one_batch_schedule, **others) == []
    texts = errors(rules.one_batch_schedule, step_schedule=((0, 8),), **others)
    assert len(texts) == (ramped or decreased)
    for text in texts:
        assert ("--rampup-batch-size" in text) is ramped and ("--decrease-batch-size-if-needed" in text) is decreased


def test_a_decreased_batch_keeps_a_micro_batch_for_every_replica():
    def found(replicas, **changes):
        return errors(rules.decreased_batch_is_not_empty, parallel={"world_size": replicas}, **changes)

    assert found(4, decrease_if_needed=True) == [] == found(5)
    (text,) = found(5, decrease_if_needed=True)
    assert "--global-batch-size 8, 5 replicas of --micro-batch-size 2" in text


BETWEEN, APART, DIVIDE = (
    "(--seq-length 32)",
    "--seq-length-warmup: ",
    "which --sequence-parallel cannot split over 4",
)


@pytest.mark.parametrize(
    ("ramp", "found"),
    [
        ({"start": 1, "iterations": 1, "step": 1}, []),
        ({"start": 32, "iterations": 1, "step": 32}, []),
        ({"start": 0, "iterations": 1, "step": 1}, [BETWEEN]),
        ({"start": 1, "iterations": 1, "step": 0}, [BETWEEN]),
        ({"start": 1, "iterations": 0, "step": 1}, ["over 0 iterations"]),
        ({"start": 33, "iterations": 1, "step": 1}, [BETWEEN]),
        ({"start": 1, "iterations": 1, "step": 33}, [BETWEEN]),
        ({"stages": ((0, 1), (5, 32))}, []),
        ({"stages": ((0, 0), (5, 32))}, [BETWEEN]),
        ({"stages": ((0, 8), (5, 33))}, [BETWEEN]),
        ({"stages": ((0, 8), (0, 32))}, [APART]),
        ({"stages": ((5, 8), (0, 32))}, [APART]),
        ({"stages": ((5, 8), (5, 33))}, [BETWEEN, APART]),
    ],
    ids=str,
)
def test_curricula(ramp, found):
    texts = errors(curriculum_rules.sequence_ramp_rises, sequence_ramp=SequenceRamp(**ramp))
    assert len(texts) == len(found) and all(part in text for part, text in zip(found, texts, strict=True)), texts
    assert errors(curriculum_rules.sequence_ramp_rises) == []


@pytest.mark.parametrize(
    ("ramp", "divides"),
    [
        ({"start": 8, "iterations": 9, "step": 4}, True),
        ({"start": 6, "iterations": 9, "step": 4}, True),
        ({"start": 6, "iterations": 9, "step": 6}, False),
        ({"start": 32, "iterations": 9, "step": 32}, True),
        ({"start": 8, "iterations": 9, "step": 2}, False),
        ({"stages": ((0, 8), (5, 32))}, True),
        ({"stages": ((0, 8), (5, 30))}, False),
    ],
    ids=str,
)
def test_tensor_parallel_ranks_share_every_length_of_a_curriculum(ramp, divides):
    def found(sequence_parallel):
        parallel = {"world_size": 4, "tp": 4, "sequence_parallel": sequence_parallel}
        return errors(curriculum_rules.sequence_ramp_rises, parallel=parallel, sequence_ramp=SequenceRamp(**ramp))

    assert found(False) == []
    assert [DIVIDE in text for text in found(True)] == ([] if divides else [True])


def test_every_rule_is_listed():
    assert {rule.__name__ for rule in rules.RULES} == {
        name
        for name, value in vars(rules).items()
        if getattr(value, "__module__", "") == rules.__name__ and "config" in getattr(value, "__annotations__", ())
    }
