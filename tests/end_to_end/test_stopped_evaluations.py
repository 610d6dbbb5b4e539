"""Stops during an evaluation: the evaluation is abandoned and repeated by the next job."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from unittest import mock

import pytest
from support.trainer import assert_same_run, checkpoints, command, iterations, measured, records, status

from megatron_lite.config.arguments import parse_run
from megatron_lite.lifecycle import stopping
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.train.job import train_job
from megatron_lite.train.native import NativeEngine

pytestmark = pytest.mark.slow

JOB = ("--train-iters", 8, "--save-interval", 3, "--eval-interval", 4, "--eval-iters", 3)
"""Validations of three steps after iterations 4 and 8 and at the end, and a test of three steps: 12 steps."""
STEPS = 12


def at_step(wanted, action):
    """Make the job call a function in an evaluation step, counted from 1 over all evaluations."""
    step, count = NativeEngine.eval_step, 0

    def act(self, *args):
        nonlocal count
        count += 1
        if count == wanted:
            action()
        return step(self, *args)

    NativeEngine.eval_step = act


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Return the --save folder of an uninterrupted run of JOB."""
    save = tmp_path_factory.mktemp("whole") / "run"
    assert command(*corpus.job(*JOB, "--save", save)).code == 0
    return save


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 11])
def test_a_signal_in_an_evaluation_stops_there_and_the_next_start_makes_it(step, corpus, start, tmp_path, whole):
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--load", save, "--tensorboard-dir", tmp_path / "board")
    result = start(args, partial(at_step, step, terminate)).wait()
    assert result.code == 0, result.err
    made = len([record for record in measured(save) if record["kind"] == "validation"])
    assert made == step // 3, "one that is being made when the signal comes is finished only if that was its last step"
    assert result.out.splitlines()[-2] == "exiting program after receiving SIGTERM"
    stopped_at = 4 if step <= 3 else 8
    assert (status(save)["status"], status(save)["saved_iteration"]) == ("signal", stopped_at)
    if step % 3:
        assert "unfinished" in result.out
    result = command(*args)
    assert result.code == 0, result.err
    assert status(save)["status"] == "completed"
    assert_same_run(whole, save)
    if step < 9:  # TensorBoard does not distinguish an evaluation at the end from one after an iteration
        assert points(tmp_path / "board", "lm loss validation") == [4, 8, 8]
    progress = read_manifest(save / "iter_0000008").scalars["progress"]
    expected = read_manifest(whole / "iter_0000008").scalars["progress"]
    if stopped_at == 4:
        assert progress == expected
    else:
        assert progress | {"validation_due": 0} == expected | {
            "consumed_valid_samples": progress["consumed_valid_samples"]
        }


def points(board, tag):
    """Return the steps of a tag in the TensorBoard files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    # The order of files of jobs started in the same second is undefined.
    return sorted(event.step for event in events.Scalars(tag))


def test_a_validation_that_is_made_late_is_kept_once_whatever_happens_after_it(corpus, start, tmp_path, whole):
    """A kill after the validation and before the next save: it is made a third time."""
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--load", save, "--tensorboard-dir", tmp_path / "board")
    assert start(args, partial(at_step, 2, terminate)).wait().code == 0
    result = start(args, partial(kill_after_iteration, 5)).wait()
    assert result.code == -signal.SIGKILL
    assert "running the unfinished validation after iteration 4" in result.out
    assert checkpoints(save)[-1] == "iter_0000004"
    assert command(*args).code == 0
    assert_same_run(whole, save)
    assert points(tmp_path / "board", "lm loss validation") == [4, 8, 8]


def kill_after_iteration(number):
    report = Reporter.iteration

    def kill(self, values):
        report(self, values)
        if values.iteration == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Reporter.iteration = kill


def test_of_several_validation_sets_all_are_made_again(corpus, start, tmp_path):
    groups = [f"{name}: 1 0.8:0.9 {path}" for name, path in zip("ab", corpus.data, strict=True)]
    train = f"all: 1 0:0.8 {corpus.data[0]}"
    args = corpus.job(*JOB)
    place = args.index("--data-path")
    args = (*args[:place], *args[place + 2 :])
    place = args.index("--split")
    args = (*args[:place], *args[place + 2 :])
    args = (*args, "--train-weighted-split-paths", train, "--valid-weighted-split-paths", *groups)
    save, other = tmp_path / "run", tmp_path / "whole"
    result = start((*args, "--save", save, "--load", save), partial(at_step, 5, terminate)).wait()
    assert result.code == 0, result.err
    assert [record["name"] for record in measured(save) if record["kind"] == "validation"] == ["a"]
    assert command(*args, "--save", save, "--load", save).code == 0
    assert command(*args, "--save", other).code == 0
    assert_same_run(other, save)


def test_a_kill_switch_in_a_validation(corpus, start, tmp_path, whole):
    save, switch = tmp_path / "run", tmp_path / "stop"
    args = corpus.job(*JOB, "--save", save, "--load", save, "--kill-switch-path", switch)
    result = start(args, partial(at_step, 2, switch.touch)).wait()
    assert result.code == 0, result.err
    assert (status(save)["status"], status(save)["iteration"]) == ("kill_switch", 4)
    switch.unlink()
    assert command(*args).code == 0
    assert_same_run(whole, save)


class Clock:
    """Clock that advances one second per evaluation step."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        step, init = NativeEngine.eval_step, stopping.Stopper.__init__

        def tick(engine, *args):
            self.now += 1.0
            return step(engine, *args)

        def started(stopper, config, flag=None, **_):
            self.now = 0.0
            init(stopper, config, flag, started=0.0, clock=lambda: self.now)

        monkeypatch.setattr(NativeEngine, "eval_step", tick)
        monkeypatch.setattr(stopping.Stopper, "__init__", started)


def test_a_time_limit_ends_a_validation(corpus, tmp_path, whole, monkeypatch):
    Clock(monkeypatch)
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--load", save)
    result = command(*args, "--exit-duration-in-mins", 1.5 / 60)
    assert result.code == 0, result.err
    assert (status(save)["status"], status(save)["iteration"]) == ("time_limit", 4)
    assert "the same command resumes from iteration 4" in result.out.splitlines()[-1]
    assert "--eval-iters" not in result.out.splitlines()[-1]
    # The next job has no more time, and its message says what to change.
    result = command(*args, "--exit-duration-in-mins", 1.5 / 60)
    assert (status(save)["status"], iterations(save)) == ("time_limit", [1, 2, 3, 4])
    assert "with a larger --exit-duration-in-mins or a smaller --eval-iters" in result.out.splitlines()[-1]
    assert command(*args).code == 0
    assert_same_run(whole, save)


def test_an_evaluation_is_not_begun_if_it_would_not_end_in_time(corpus, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("megatron_lite.train.loop.time.monotonic", lambda: clock.now)
    clock = Clock(monkeypatch)
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--load", save)
    result = command(*args, "--exit-duration-in-mins", 5 / 60)
    assert result.code == 0, result.err
    assert (status(save)["status"], status(save)["iteration"]) == ("time_limit", 8)
    assert "exiting program after 0.1 minutes, leaving 3 s for the evaluation and the save" in result.out
    assert [record["iteration"] for record in measured(save) if record["kind"] == "validation"] == [4]
    monkeypatch.undo()
    assert command(*args).code == 0
    assert_same_run(whole, save)


def on_one_of(backend, args, rank, steps):
    """Run a job on one rank with SIGTERM in an evaluation step, for rank `rank` only."""
    config = parse_run(args, world_size=backend.world_size).config
    step, count = NativeEngine.eval_step, 0

    def act(self, *args):
        nonlocal count
        count += 1
        if count == steps and backend.rank == rank:
            terminate()
        return step(self, *args)

    with (
        mock.patch.object(NativeEngine, "eval_step", act),
        ExitRecord(config.checkpoint.save, backend.launch) as record,
    ):
        train_job(config, record, started=time.monotonic(), backend=backend)
    return count


@pytest.mark.parametrize(
    "layout",
    [(), ("--pipeline-model-parallel-size", 2), ("--tensor-model-parallel-size", 2)],
    ids=["dp2", "pp2", "tp2"],
)
def test_a_signal_to_one_rank_ends_the_evaluation_on_all(layout, corpus, on_ranks, tmp_path):
    def job(save):
        return [str(word) for word in corpus.job(*JOB, *layout, "--save", save, "--load", save)[1:]]

    save, other = tmp_path / "run", tmp_path / "whole"
    assert on_ranks(2, on_one_of, job(save), 1, 2) == [2, 2]
    assert (status(save)["status"], status(save)["iteration"]) == ("signal", 4)
    assert on_ranks(2, on_one_of, job(save), 1, 0) == [STEPS, STEPS]
    assert on_ranks(2, on_one_of, job(other), 1, 0) == [STEPS, STEPS]
    assert_same_run(other, save)


@pytest.mark.parametrize(("step", "made"), [(1, []), (4, ["validation"])])
def test_an_evaluation_job_stops_as_well(step, made, corpus, start, tmp_path, whole):
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--load", whole, "--save", save, "--skip-train")
    result = start(args, partial(at_step, step, terminate)).wait()
    assert result.code == 0, result.err
    assert "unfinished" in result.out
    assert result.out.splitlines()[-1] == "exiting program after receiving SIGTERM"
    assert [record["split"] for record in measured(save)] == made
    assert (status(save)["status"], status(save)["iteration"]) == ("signal", 8)
    assert command(*args).code == 0
    assert status(save)["status"] == "evaluated"


def test_messages(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--load", save)
    assert start(args, partial(at_step, 2, terminate)).wait().code == 0
    texts = [record["text"] for record in records(save) if record["kind"] == "message"]
    assert "the validation after iteration 4 is unfinished; the next start runs it first" in texts
    assert read_manifest(save / "iter_0000004").scalars["progress"]["validation_due"] == 1


def terminate_in_the_last_save():
    from megatron_lite.train import state

    save = state.save_checkpoint

    def act(request, *rest):
        if request.iteration == 8:
            terminate()
        return save(request, *rest)

    state.save_checkpoint = act


@pytest.mark.parametrize(("more", "expected"), [((), "signal"), (("--split", "1,0,0"), "completed")])
def test_a_run_without_evaluations_left_is_complete_whatever_comes_in_its_last_save(
    more, expected, corpus, start, tmp_path
):
    args = corpus.job(
        "--train-iters", 8, "--save-interval", 8, "--eval-interval", 100, *more, "--save", tmp_path / "run"
    )
    result = start(args, terminate_in_the_last_save).wait()
    assert result.code == 0, result.err
    assert (status(tmp_path / "run")["status"], status(tmp_path / "run")["iteration"]) == (expected, 8)
