"""Stop conditions: each limit alone, with an injected clock; signals; the hint for resuming."""

from __future__ import annotations

import os
import signal
import time

import pytest
from support.job_commands import SMALL

from megatron_lite.backend.environment import host_name
from megatron_lite.config.arguments import parse_run
from megatron_lite.config.training import TrainingConfig
from megatron_lite.lifecycle.exit_status import REPEAT_SECONDS
from megatron_lite.lifecycle.stopping import SignalFlag, Stop, Stopper, agree, agree_and_gather, resume_hint
from megatron_lite.schedules.progress import Progress


def stops_at(config: TrainingConfig, *, start: int = 0, samples: int = 4, limit: int = 50) -> tuple[int, str] | None:
    stopper = Stopper(config, clock=lambda: 0.0)
    progress = Progress(iteration=start, consumed_train_samples=start * samples)
    for _ in range(limit):
        progress = progress.advance(samples, samples, True)
        if stop := stopper.after_iteration(progress):
            return progress.iteration, stop.status
    return None


def test_nothing_stops_a_run_without_limits():
    assert stops_at(TrainingConfig(train_iters=100)) is None


@pytest.mark.parametrize(
    ("config", "start", "expected"),
    [
        # --exit-interval is absolute: a run resumed at 25 stops at 30, not at 35.
        (TrainingConfig(exit_interval=10), 25, (30, "exit_flag")),
        (TrainingConfig(exit_interval=10), 30, (40, "exit_flag")),
        (TrainingConfig(exit_after_iters=10), 25, (35, "exit_flag")),
        (TrainingConfig(exit_samples=42), 0, (11, "exit_flag")),
    ],
)
def test_limits_in_iterations_and_samples(config, start, expected):
    assert stops_at(config, start=start) == expected


def test_duration_is_measured_from_the_start_of_the_job():
    now = 0.0
    stopper = Stopper(TrainingConfig(exit_duration_minutes=2), clock=lambda: now)
    now = 119.0
    assert stopper.after_iteration(Progress(iteration=1)) is None
    now = 121.0
    stop = stopper.after_iteration(Progress(iteration=2))
    assert stop is not None
    assert stop.status == "time_limit"


def test_kill_switch(tmp_path):
    switch = tmp_path / "stop"
    stopper = Stopper(TrainingConfig(kill_switch_path=str(switch)))
    assert stopper.after_iteration(Progress(iteration=1)) is None
    switch.touch()
    stop = stopper.after_iteration(Progress(iteration=2))
    assert stop is not None
    assert str(switch) in stop.message


def test_start_up_counts_in_the_time_limit():
    stopper = Stopper(TrainingConfig(exit_duration_minutes=2), started=-61.0, clock=lambda: 60.0)
    assert stopper.after_iteration(Progress(iteration=1)) is not None


def test_a_limit_that_is_reached_already_stops_before_the_first_iteration(tmp_path):
    done = Progress(iteration=10, consumed_train_samples=40)
    assert Stopper(TrainingConfig(exit_samples=40)).before_iteration(done) is not None
    assert Stopper(TrainingConfig(exit_samples=41, exit_interval=10)).before_iteration(done) is None
    assert Stopper(TrainingConfig(kill_switch_path=str(tmp_path))).before_iteration(done) is not None


def agreed(backend, stopping):
    world = backend.new_group("world", (tuple(range(backend.world_size)),))
    return [
        agree(world, Stop("signal", f"rank {backend.rank}") if backend.rank in ranks else None) for ranks in stopping
    ]


def test_all_ranks_agree_on_the_stop_of_any_rank(on_ranks):
    results = on_ranks(3, agreed, [(), (2,), (1, 2), ()])
    where = [f"rank {rank} (on {host_name()}, rank {rank})" for rank in (2, 1)]
    assert all([stop and stop.message for stop in result] == [None, *where, None] for result in results)


def gathered(backend):
    world = backend.new_group("world", (tuple(range(backend.world_size)),))
    stop = Stop("signal", "rank 1") if backend.rank == 1 else None
    first = agree_and_gather(world, None, [0.5 + backend.rank, 2.0])
    second = agree_and_gather(world, stop, [0.25])
    return first, second[0].message, second[1]


def test_numbers_of_each_rank_are_gathered_with_the_agreement(on_ranks):
    message = f"rank 1 (on {host_name()}, rank 1)"
    assert on_ranks(2, gathered) == [((None, [[0.5, 2.0], [1.5, 2.0]]), message, [[0.25], [0.25]])] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_iteration_and_handlers_are_restored(number, capfd):
    before = signal.getsignal(number)
    with SignalFlag() as flag:
        stopper = Stopper(TrainingConfig(), flag)
        assert stopper.after_iteration(Progress(iteration=1)) is None
        os.kill(os.getpid(), number)
        stop = stopper.after_iteration(Progress(iteration=2))
        assert stop is not None
        assert stop.status == "signal"
    assert signal.Signals(number).name in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once():
    with SignalFlag():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, forwarded by a launcher
        time.sleep(REPEAT_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


SIGNAL = Stop("signal", "exiting program after receiving SIGINT")
SAVING = ("--save", "run", "--save-interval", "5")


@pytest.mark.parametrize(
    ("words", "stop", "saved", "line"),
    [
        ((*SAVING, "--load", "./run"), SIGNAL, 7, "the same command resumes from iteration 7"),
        (SAVING, SIGNAL, 7, "the same command resumes from iteration 7 with --load run"),
        (
            (*SAVING, "--load", "old", "--finetune"),
            SIGNAL,
            7,
            "the same command resumes from iteration 7 with --load run, without --finetune",
        ),
        (
            (*SAVING, "--load", "run", "--load-iteration", "2"),
            SIGNAL,
            5,
            "the same command resumes from iteration 5 without --load-iteration; iterations up to 7 are not saved",
        ),
        (SAVING, SIGNAL, None, "run holds no checkpoint: the same command starts where this one did"),
        ((), SIGNAL, None, "nothing was saved: give --save and --load to resume a run"),
    ],
)
def test_resume_hint(words, stop, saved, line):
    assert resume_hint(parse_run([*SMALL, *words]).config, stop, 7, saved) == f"  {line}"


def test_the_hint_names_a_required_change_and_is_absent_for_a_complete_run(tmp_path):
    config = parse_run([*SMALL, *SAVING, "--load", "run"]).config
    done = Progress(iteration=7, consumed_train_samples=40)
    lines = []
    for limit in (TrainingConfig(exit_samples=40), TrainingConfig(kill_switch_path=str(tmp_path))):
        stop = Stopper(limit).before_iteration(done)
        assert stop is not None
        lines.append(resume_hint(config, stop, 7, 7))
    assert lines == [
        "  the same command resumes from iteration 7 with a larger --exit-samples",
        f"  the same command resumes from iteration 7 once {tmp_path} is gone",
    ]
    assert resume_hint(config, Stop("completed", ""), 7, 7) is None
