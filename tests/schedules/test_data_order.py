"""Data history of a run: segments added and kept by resumed jobs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.batch import Rampup
from megatron_lite.config.data import DataConfig, DataSource
from megatron_lite.config.record import from_record
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size
from megatron_lite.schedules.data_order import DataSegment, extend_history, history_of_config
from megatron_lite.schedules.length import is_finished, train_samples, valid_samples
from megatron_lite.schedules.progress import Progress

RUN = {"global_batch_size": 4, "train_iters": 30, "eval_interval": 5, "eval_iters": 2}


def advanced(config, progress, iterations):
    """Return the progress after further iterations with validations, by a plain loop."""
    for _ in range(iterations):
        if is_finished(config, progress):
            break
        size = global_batch_size(config.batch, progress.consumed_train_samples, config.parallel.dp)
        progress = progress.advance(size, size * config.batch.seq_length, applied=True)
        if config.training.eval_interval and progress.iteration % config.training.eval_interval == 0:
            read = config.training.eval_iters * final_batch_size(config.batch, config.parallel.dp)
            progress = replace(progress, consumed_valid_samples=progress.consumed_valid_samples + read)
    return progress


@st.composite
def jobs(draw):
    """Strategy for the flags of a job, with length in iterations or samples."""
    fields = {
        "eval_interval": draw(st.integers(0, 9)),
        "eval_iters": draw(st.integers(1, 4)),
        "dp": draw(st.integers(1, 3)),
    }
    fields["global_batch_size"] = draw(st.integers(1, 12))
    if draw(st.booleans()):
        fields["rampup"] = Rampup(start=fields["global_batch_size"], increment=2, samples=draw(st.integers(0, 90)))
        fields["global_batch_size"] += 2 * draw(st.integers(0, 5))
    fields["decrease_if_needed"] = draw(st.booleans())
    fields[draw(st.sampled_from(["train_iters", "train_samples"]))] = draw(st.integers(1, 200))
    return fields


@settings(max_examples=150, deadline=None)
@given(chain=st.lists(st.tuples(jobs(), st.integers(1, 40)), min_size=1, max_size=4))
def test_requests_cover_every_job(run_config, chain):
    """Requests are ascending for any changes of flags, and the last one covers the job."""
    history, progress = (), Progress()
    for fields, iterations in chain:
        config, before = run_config(**fields), history
        history = extend_history(history, config, progress)
        now = history[-1]
        assert list(now.train_requests) == sorted(set(now.train_requests))
        if before:
            assert now.train_requests[: len(before[-1].train_requests)] == before[-1].train_requests
            assert now.valid_requests[: len(before[-1].valid_requests)] == before[-1].valid_requests
        end = advanced(config, progress, 10**6)
        read_at_the_end = config.training.eval_iters * final_batch_size(config.batch, config.parallel.dp)
        assert max(now.train_requests, default=0) >= end.consumed_train_samples
        assert max(now.valid_requests) >= end.consumed_valid_samples + read_at_the_end
        progress = advanced(config, progress, iterations)


@settings(max_examples=100, deadline=None)
@given(fields=jobs(), iterations=st.integers(0, 60))
def test_an_unchanged_run_keeps_its_requests(run_config, fields, iterations):
    config = run_config(**fields)
    history, progress = extend_history((), config), advanced(config, Progress(), iterations)
    assert extend_history(history, config, progress) == history
    assert history[-1].train_requests == (train_samples(config),)
    assert history[-1].valid_requests == (valid_samples(config),)


def test_a_longer_run_adds_a_segment_and_a_shorter_one_keeps_it(run_config):
    config = run_config(**RUN)
    history = extend_history((), config)
    at_20 = Progress(iteration=20, consumed_train_samples=80, consumed_valid_samples=32)
    longer = extend_history(history, run_config(**{**RUN, "train_iters": 130}), at_20)
    assert [(one.iteration, one.consumed, one.train_requests) for one in longer] == [
        (0, 0, (120,)),
        (20, 80, (120, 520)),
    ]
    at_40 = Progress(iteration=40, consumed_train_samples=160, consumed_valid_samples=64)
    shorter = extend_history(longer, run_config(**{**RUN, "train_iters": 50}), at_40)
    assert shorter == longer


def test_an_unfinished_validation_is_requested(run_config):
    config = run_config(**RUN)
    at_20 = Progress(iteration=20, consumed_train_samples=80, consumed_valid_samples=3 * 8, validation_due=1)
    assert valid_samples(config, at_20) == valid_samples(config)
    assert extend_history(extend_history((), config), config, at_20) == extend_history((), config)


def test_validation_samples_are_requested_when_validation_is_enabled(run_config):
    history = extend_history((), run_config(**{**RUN, "eval_iters": 0}))
    assert history[-1].valid_requests == ()
    later = extend_history(history, run_config(**RUN), Progress(iteration=20, consumed_train_samples=80))
    assert later[-1].valid_requests == ((2 + 1) * 2 * 4,)


def test_the_cyclic_order_keeps_its_layout_and_its_size(run_config):
    cyclic = DataConfig(sampler="cyclic")
    began = replace(run_config(**RUN, dp=2), data=cyclic)
    history = extend_history((), began)
    assert history[-1].cyclic_layout == (1, 2)
    wide = replace(run_config(**{**RUN, "train_iters": 500, "micro_batch_size": 2}, dp=4), data=cyclic)
    now = extend_history(history, wide, Progress(iteration=20, consumed_train_samples=80))[-1]
    assert (now.cyclic_layout, now.train_requests) == ((1, 2), (120,))
    assert extend_history(history, run_config(**RUN), Progress(iteration=1))[-1].cyclic_layout is None


def test_skip_train_requests_no_training_data(run_config):
    config = run_config(**{**RUN, "train_iters": 0, "skip_train": True})
    assert extend_history((), config)[-1].train_requests == ()
    history = extend_history((), run_config(**RUN))
    ended = Progress(iteration=30, consumed_train_samples=120, consumed_valid_samples=48)
    assert extend_history(history, config, ended)[-1].train_requests == (120,)


def test_a_segment_roundtrips_through_json(run_config):
    config = replace(
        run_config(**RUN, dp=2, rampup=Rampup(start=2, increment=2, samples=10), skip_iteration_ranges=((3, 4),)),
        data=DataConfig(sources=(DataSource(path="a", weight=0.5),), sampler="cyclic"),
    )
    segment = extend_history((), config, fingerprints={"data order": "x"})[-1]
    back = from_record(DataSegment, json.loads(json.dumps(asdict(segment))))
    assert back == segment
    other = run_config(global_batch_size=9, train_iters=7)
    then = back.apply_to(other)
    assert (then.batch, then.data, then.parallel.dp) == (config.batch, config.data, 2)
    assert then.training == replace(other.training, skip_iteration_ranges=((3, 4),))


def test_history_of_a_checkpoint_without_history(run_config):
    saved = json.loads(json.dumps(asdict(run_config(**RUN, dp=2))))
    saved["batch"]["a_field_of_the_past"] = 1
    del saved["data"]["sampling"]
    current = run_config(**{**RUN, "train_iters": 500})
    assert [one.train_requests for one in history_of_config(saved, current)] == [(120,)]
    assert history_of_config(saved, current)[0].config["dp"] == 2
    assert history_of_config({"model": {}}, current) == ()


@pytest.mark.parametrize("interval", [0, 1, 7])
def test_validation_of_a_finished_run_continues_in_its_data(run_config, interval):
    config = run_config(**{**RUN, "eval_interval": interval})
    ended = advanced(config, Progress(), 1000)
    assert valid_samples(config, ended) == ended.consumed_valid_samples + 2 * 4
