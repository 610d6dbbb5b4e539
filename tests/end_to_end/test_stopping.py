"""Stops by Ctrl-C, signals and limits: messages, saves, and a resume without loss."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from support.trainer import assert_same_run, checkpoints, command, iterations, measured, records, status

from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.lifecycle.exit_status import REPEAT_SECONDS
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.train import state
from megatron_lite.train.native import NativeEngine

pytestmark = pytest.mark.slow

SHORT = ("--train-iters", 8, "--save-interval", 3, "--eval-interval", 4)


def signal_after(number, iteration, times=1):
    """Make the process send itself a signal in an iteration, before its end."""
    step = NativeEngine.train_step

    def step_and_send(self, plan, read, rates):
        pending = step(self, plan, read, rates)
        if plan.iteration == iteration:
            for time_left in range(times, 0, -1):
                os.kill(os.getpid(), number)
                time.sleep(REPEAT_SECONDS * (time_left > 1))
        return pending

    NativeEngine.train_step = step_and_send


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_iteration_saves_and_exits_cleanly(number, corpus, start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = corpus.job(*SHORT, "--save", broken, "--load", broken, "--log-interval", 100)
    result = start(args, partial(signal_after, number, 5)).wait()
    assert result.code == 0
    assert f"{number.name} received: finishing this step, then saving and stopping." in result.err
    assert ("Press Ctrl-C again to stop at once" in result.err) == (number == signal.SIGINT)
    numbers, save = result.out.rindex("iteration        5/"), result.out.rindex("saving checkpoint")
    assert numbers < save, "the last line of numbers comes before the last save"
    *_, reason, hint = result.out.splitlines()
    assert reason == f"exiting program after receiving {number.name}"
    assert hint == "  the same command resumes from iteration 5"
    assert checkpoints(broken) == ["iter_0000003", "iter_0000005"]
    ended = status(broken)
    assert (ended["status"], ended["iteration"], ended["saved_iteration"]) == ("signal", 5, 5)
    assert command(*args).code == 0
    assert command(*corpus.job(*SHORT, "--save", whole)).code == 0
    assert_same_run(whole, broken)


def test_a_background_save_is_complete_before_the_last_message(corpus, start, tmp_path):
    args = corpus.job(*SHORT, "--async-save", "--save", tmp_path / "run")
    result = start(args, partial(signal_after, signal.SIGTERM, 5)).wait()
    assert result.code == 0
    assert checkpoints(tmp_path / "run") == ["iter_0000003", "iter_0000005"]
    *_, saved, reason, hint = result.out.splitlines()
    assert "successfully saved checkpoint at iteration       5" in saved
    assert reason == "exiting program after receiving SIGTERM"
    assert hint == f"  the same command resumes from iteration 5 with --load {tmp_path / 'run'}"


def test_a_second_ctrl_c_stops_at_once(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    result = start(args, partial(signal_after, signal.SIGINT, 5, times=2)).wait()
    assert result.code == 130
    assert result.err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in result.err
    assert checkpoints(save) == ["iter_0000003"]
    assert status(save)["status"] == "signal"
    assert "without saving" in status(save)["message"]
    assert command(*args).code == 0
    assert iterations(save) == list(range(1, 9))


def test_a_signal_without_the_handler_kills(corpus, start, tmp_path):
    args = corpus.job(*SHORT, "--no-exit-signal-handler", "--save", tmp_path / "run")
    result = start(args, partial(signal_after, signal.SIGTERM, 5)).wait()
    assert result.code == -signal.SIGTERM
    assert checkpoints(tmp_path / "run") == ["iter_0000003"]


def test_ctrl_c_in_a_terminal(corpus, tmp_path):
    """Ctrl-C in a pseudo-terminal with its own interpreter, after the progress bar appears."""
    save = tmp_path / "run"
    args = [
        str(word)
        for word in corpus.job(
            "--train-iters", 100_000, "--save", save, "--save-interval", 90_000, "--log-interval", 5
        )[1:]
    ]
    keyboard, terminal = pty.openpty()
    script = Path(__file__).parents[2] / "pretrain_gpt.py"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    job = subprocess.Popen(
        [sys.executable, script, *args], stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
        start_new_session=True, preexec_fn=partial(_own_terminal, terminal),
    )  # fmt: skip
    os.close(terminal)
    shown = ""
    while "tokens/s ·" not in shown:
        shown += os.read(keyboard, 1 << 16).decode()
    os.write(keyboard, b"\x03")
    try:
        while block := os.read(keyboard, 1 << 16):
            shown += block.decode()
    except OSError:  # end of a terminal on Linux
        pass
    assert job.wait(60) == 0, shown
    os.close(keyboard)
    assert "SIGINT received: finishing this step" in shown
    assert "exiting program after receiving SIGINT" in shown
    assert shown.rindex("successfully saved checkpoint") < shown.rindex("exiting program")
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :], "the cursor is back"
    assert shown.rindex("\x1b[?25h") < shown.rindex("saving checkpoint"), "the bar stays behind, above the last args"
    assert len(checkpoints(save)) == 1


def _own_terminal(terminal):
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_finished_run_is_not_changed_by_another_start(corpus, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    assert command(*args).code == 0

    def content():
        files = [path for path in save.rglob("*") if path.is_file() and path.name != "exit_status.json"]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = content()
    for _ in range(2):
        result = command(*args)
        assert result.code == 0
        assert "This run is complete: it ended at iteration 8" in result.out
        assert "--train-iters" in result.out
        assert content() == before
        assert (status(save)["status"], status(save)["iteration"], status(save)["saved_iteration"]) == (
            "completed",
            8,
            8,
        )


def test_a_run_killed_in_its_last_evaluations_makes_them_when_started_again(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    result = start(args, _die_in_the_last_evaluation).wait()
    assert result.code == -signal.SIGKILL
    assert checkpoints(save)[-1] == "iter_0000008"
    result = command(*args)
    assert result.code == 0
    assert "training is complete after 8 iterations" in result.out
    ends = [record["split"] for record in measured(save) if record.get("at_end")]
    assert ends == ["validation", "test"]
    assert iterations(save) == list(range(1, 9))
    assert status(save)["status"] == "completed"


def _die_in_the_last_evaluation():
    Reporter.validation = lambda self, report: os.kill(os.getpid(), signal.SIGKILL) if report.at_end else None


def test_a_finished_run_can_be_extended(corpus, tmp_path):
    save = tmp_path / "run"
    job = partial(corpus.job, "--save", save, "--load", save, "--save-interval", 3, "--lr-decay-style", "cosine")
    assert command(*job("--train-iters", 6)).code == 0
    refused = command(*job("--train-iters", 10))
    assert refused.code == 1
    assert "--lr-decay-iters: 6 in the checkpoint, 10 now" in refused.err
    assert "--override-opt-param-scheduler" in refused.err
    assert "--use-checkpoint-opt-param-scheduler" in refused.err
    result = command(*job("--train-iters", 10, "--override-opt_param-scheduler"))
    assert result.code == 0
    assert "--lr-decay-iters: 6 in the checkpoint, 10 now" in result.out
    assert iterations(save) == list(range(1, 11))
    assert not [record for record in measured(save) if record.get("at_end") and record["iteration"] == 6]


def test_the_checkpoints_schedule_can_be_kept_by_a_longer_run(corpus, tmp_path):
    save = tmp_path / "run"
    job = partial(corpus.job, "--save", save, "--load", save, "--save-interval", 3, "--min-lr", 1e-4)
    assert command(*job("--train-iters", 6)).code == 0
    assert command(*job("--train-iters", 9, "--use-checkpoint-opt_param-scheduler")).code == 0
    rates = [record["learning_rate"] for record in measured(save) if record["kind"] == "iteration"]
    assert rates[5:] == [1e-4] * 4


@pytest.mark.parametrize(
    ("args", "last", "expected", "message"),
    [
        (("--exit-interval", 5), 5, "exit_flag", "exiting program at iteration 5 (--exit-interval)"),
        (("--exit-samples", 18), 5, "exit_flag", "exiting program after 20 samples (--exit-samples)"),
        (("--exit-after-iters", 2), 2, "exit_flag", "exiting program after 2 iterations (--exit-after-iters)"),
        (("--exit-duration-in-mins", 1e-9), 1, "time_limit", "exiting program after 0.0 minutes"),
        # The end of the run takes precedence over an exit at the same iteration.
        (("--exit-interval", 8), 8, "completed", "training is complete after 8 iterations"),
    ],
)
def test_limits_save_and_report_the_reason(args, last, expected, message, corpus, tmp_path):
    save = tmp_path / "run"
    result = command(*corpus.job(*SHORT, "--save", save, *args))
    assert result.code == 0
    assert message in result.out.splitlines()[-2:], "what follows it says how to go on"
    assert checkpoints(save)[-1] == f"iter_{last:07d}"
    assert result.out.count("successfully saved") == len(checkpoints(save)), "each once"
    assert status(save) | {"time": "", "message": message} == status(save) | {"time": ""}
    assert (status(save)["status"], status(save)["iteration"]) == (expected, last)
    assert [record["text"] for record in records(save) if record["kind"] == "message"].count(message) == 1


def test_a_limit_that_was_reached_before_is_not_passed_by_starting_again(corpus, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save, "--exit-samples", 18)
    for _ in range(3):
        assert command(*args).code == 0
        assert iterations(save) == list(range(1, 6))


def test_kill_switch(corpus, start, tmp_path):
    save, switch = tmp_path / "run", tmp_path / "stop"
    args = corpus.job(
        "--train-iters",
        100_000,
        "--save",
        save,
        "--save-interval",
        90_000,
        "--load",
        save,
        "--kill-switch-path",
        switch,
    )
    job = start(args)
    assert job.until(lambda: (save / "metrics.jsonl").exists() and len(iterations(save)) >= 3)
    switch.touch()
    result = job.wait()
    assert result.code == 0
    assert f"Detected kill switch at {switch}. Exiting" in result.out
    assert status(save)["status"] == "kill_switch"
    stopped = iterations(save)
    assert checkpoints(save) == [f"iter_{stopped[-1]:07d}"]
    # While the file exists, later jobs train nothing.
    assert command(*args).code == 0
    assert iterations(save) == stopped


def test_an_error_is_recorded_with_host_and_rank(corpus, tmp_path, monkeypatch):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save)
    assert command(*args, "--exit-after-iters", 3).code == 0

    def broken(request, *rest):
        if request.iteration == 6:
            raise RuntimeError("the controller is on fire")
        return save_checkpoint(request, *rest)

    monkeypatch.setattr(state, "save_checkpoint", broken)
    with pytest.raises(RuntimeError):
        command(*args, "--load", save)
    ended = status(save)
    assert (ended["status"], ended["message"]) == ("error", "the controller is on fire")
    assert (ended["iteration"], ended["saved_iteration"]) == (6, 3)
    assert (ended["host"], ended["rank"]) == (os.uname().nodename, 0)


def test_a_slurm_jobs_end_stops_the_run(corpus, tmp_path, monkeypatch):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))  # without squeue
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    refused = command(*args, "--job-end-margin-in-secs", 7200)
    assert refused.code == 1
    assert "--job-end-margin-in-secs 7200 reserves all of it" in refused.err
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    result = command(*args, "--job-end-margin-in-secs", 3595)
    assert result.code == 0
    assert "WARNING: Slurm job 7, which ends at" in result.out
    assert "before the end of Slurm job 7, leaving 10 s for the save and 3595 s after it" in result.out
    assert (status(save)["status"], status(save)["saved_iteration"]) == ("time_limit", 1)
    seconds = [record for record in records(save) if record["kind"] == "save"]
    assert [record["iteration"] for record in seconds] == [1]
    result = command(*args)
    assert "because of Slurm job 7" in result.out
    kept = int(
        re.search(r": (\d+) s for the save and 30 s after it \(--job-end-margin-in-secs\) are kept", result.out)[1]
    )
    assert kept < 10, "1.5 times the save of the first job, not the default of 10 s and more"
    assert status(save)["status"] == "completed"
    assert "Slurm job" not in command(*args, "--train-iters", 9, "--no-exit-before-job-end").out
