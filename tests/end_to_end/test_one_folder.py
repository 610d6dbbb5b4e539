"""Several jobs with one --save folder: exit_status.json of the last job, and the lock on the folder."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
from support.trainer import Job, checkpoints, command, iterations, status

from megatron_lite.runs import lock, process
from megatron_lite.runs.lock_file import LOCK_NAME, read_owner

pytestmark = pytest.mark.slow

SHORT = ("--train-iters", 4, "--save-interval", 2)
LONG = ("--train-iters", 100_000, "--save-interval", 50_000)


def content(folder):
    """Return the content of a folder, without the name of the lock file, which heartbeats change."""
    return {
        path.relative_to(folder).parts if path.parent.name != LOCK_NAME else "lock": path.is_file()
        and path.read_bytes()
        for path in folder.rglob("*")
    }


def test_an_error_in_the_command_line_replaces_the_exit_status(corpus, tmp_path, monkeypatch):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    assert command(*args).code == 0
    for wrong, variables in (
        (("--tran-iters", 3), {}),
        (("--seed", "abc"), {}),
        (("--data-path", tmp_path / "missing"), {}),
        (("--tensor-model-parallel-size", 2), {}),
        ((), {"RANK": "0", "WORLD_SIZE": "two"}),
        ((), {"RANK": "0", "WORLD_SIZE": "2"}),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            result = command(*args, *wrong)
        assert result.code == 1
        ended = status(save)
        assert (ended["status"], ended["saved_iteration"], ended["host"]) == ("error", 4, os.uname().nodename)
        assert ended["message"] in result.err
        result = command(*args)
        assert (result.code, "This run is complete: it ended at iteration 4" in result.out) == (0, True), result.err
        assert status(save)["status"] == "completed"
        assert sorted(path.name for path in save.iterdir() if not path.name.startswith("iter_")) == [
            "completed_iteration.txt",
            "exit_status.json",
            "latest_checkpointed_iteration.txt",
            "metrics.jsonl",
        ]


def test_a_command_without_job_keeps_the_exit_status(corpus, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save)
    assert command(*args).code == 0
    before = content(save)
    assert command(*args, "--dry-run").code == 0
    assert command(*args, "--dry-run", "--tran-iters", 3).code == 1
    assert command(*args, "--help").code == 0
    assert content(save) == before


def test_a_failed_import_is_recorded(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save)
    assert command(*args, "--exit-after-iters", 1).code == 0

    def break_import():
        import sys

        sys.modules["megatron_lite.train.job"] = None

    result = start(args, break_import).wait()
    assert result.code == 1
    assert (status(save)["status"], "train.job" in status(save)["message"]) == ("error", True)


def running(start, args, save, prepare=None):
    job = start(args, prepare)
    assert job.until(lambda: (save / "metrics.jsonl").exists() and len(iterations(save)) >= 2)
    return job


def test_a_second_job_is_refused_and_writes_nothing(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*LONG, "--save", save, "--load", save)
    job = running(start, args, save)
    os.kill(job.process.pid, signal.SIGSTOP)
    held = content(save)
    for more in ((), ("--tran-iters", 3), ("--skip-train",), ("--data-path", tmp_path / "missing")):
        result = command(*args, *more)
        assert result.code == 1
        if more in ((), ("--skip-train",)):
            assert f"{save} is in use by process" in result.err
            assert f"process {job.process.pid} on {os.uname().nodename} (train, since " in result.err
            assert "suspended (SIGSTOP): `kill -CONT" in result.err
    for other in (
        ("rollback", save, "--to", 2),
        ("checkpoint", "reshard", tmp_path / "other", "--output", save),
        ("checkpoint", "average", tmp_path / "other", tmp_path / "other", "--output", save),
    ):
        if other[0] == "checkpoint" and not (tmp_path / "other").exists():
            assert command(*corpus.job(*SHORT, "--save", tmp_path / "other")).code == 0
        result = command(*other)
        assert result.code == 1
        assert "is in use by process" in result.err
    assert content(save) == held
    os.kill(job.process.pid, signal.SIGCONT)
    job.send(signal.SIGTERM)
    result = job.wait()
    assert result.code == 0, result.err
    assert status(save)["status"] == "signal"
    assert checkpoints(save) == [f"iter_{iterations(save)[-1]:07d}"]
    assert not (save / LOCK_NAME).exists()


def test_another_job_may_load_from_a_folder_in_use(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job("--train-iters", 100_000, "--save-schedule", "2:2 50000", "--save", save)
    job = running(start, args, save)
    assert job.until(lambda: checkpoints(save) == ["iter_0000002"])
    result = command(*corpus.job(*SHORT, "--load", save, "--finetune", "--save", tmp_path / "other"))
    assert result.code == 0, result.err
    job.process.kill()


def test_after_a_kill_the_next_job_takes_over_the_lock(corpus, start, tmp_path):
    save = tmp_path / "run"
    job = running(start, corpus.job(*LONG, "--save", save, "--load", save), save)
    job.process.kill()
    job.process.join()
    assert read_owner(save).process.pid == job.process.pid
    assert not (save / "exit_status.json").exists()
    result = command(*corpus.job(*SHORT, "--save", save, "--load", save))
    assert result.code == 0, result.err
    assert f"taking over the lock of {save}, left behind by process {job.process.pid}" in result.err
    assert iterations(save) == [1, 2, 3, 4]
    assert not (save / LOCK_NAME).exists()


def often():
    """Shorten the heartbeat interval."""
    lock.HEARTBEAT_SECONDS = 0.3


def elsewhere():
    """Give this process the identity of another machine."""
    often()
    process.machine_id = lambda: "another kernel"


@pytest.mark.parametrize("world", [(), ("--async-save",)])
def test_a_paused_job_without_lock_stops_without_writing(world, corpus, start, tmp_path):
    save = tmp_path / "run"
    job = running(start, corpus.job(*LONG, *world, "--save", save, "--load", save), save, often)
    os.kill(job.process.pid, signal.SIGSTOP)
    (tmp_path / "second").mkdir()
    second = Job(tmp_path / "second", corpus.job(*SHORT, "--save", save, "--load", save), elsewhere)
    result = second.wait()
    assert result.code == 0, result.err
    assert f"{save} is locked by process {job.process.pid}" in result.err
    assert "for its next heartbeat" in result.err
    assert "taking over the lock" in result.err
    assert (iterations(save), status(save)["status"]) == ([1, 2, 3, 4], "completed")
    before = content(save)
    os.kill(job.process.pid, signal.SIGCONT)
    result = job.wait()
    assert result.code == 1
    assert "has lost the lock" in result.err and "the file was removed" in result.err
    assert content(save) == before


def test_an_evaluation_job_takes_the_lock(corpus, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    assert command(*args).code == 0
    assert command(*args, "--skip-train").code == 0
    ended = status(save)
    assert (ended["status"], ended["message"], ended["iteration"]) == (
        "evaluated",
        "evaluation is complete at iteration 4",
        4,
    )
    assert "This run is complete" in command(*args).out


def test_the_lock_is_released_by_a_command_that_fails(corpus, tmp_path):
    save = tmp_path / "run"
    assert command(*corpus.job(*SHORT, "--save", save)).code == 0
    assert command("rollback", save, "--to", 3).code == 1
    assert command("rollback", tmp_path / "missing", "--to", 3).code == 1
    assert command("checkpoint", "average", save, "--output", tmp_path / "out").code == 1
    assert not (tmp_path / "missing").exists()
    assert not (tmp_path / "out").exists()
    assert not (save / LOCK_NAME).exists()


def test_sigterm_ends_a_command_and_releases_the_lock(corpus, start, tmp_path):
    save = tmp_path / "run"
    assert command(*corpus.job(*SHORT, "--save", save)).code == 0
    result = start(("checkpoint", "reshard", save, "--output", tmp_path / "out"), terminate_in_reshard).wait()
    assert result.code == -signal.SIGTERM
    assert "SIGTERM received: stopped" in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def terminate_in_reshard():
    from megatron_lite.checkpoint.reading import CheckpointReader

    CheckpointReader.read = lambda *_: os.kill(os.getpid(), signal.SIGTERM)


def interrupted_at(number, function):
    """Make the job send itself a signal at a function of train.assemble."""
    from megatron_lite.train import assemble

    setattr(assemble, function, lambda *_, **__: os.kill(os.getpid(), number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("function", ["find_start", "build_datasets", "load_start"])
def test_a_signal_while_loading_is_the_exit_status(number, function, corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*SHORT, "--save", save, "--load", save)
    assert command(*args, "--exit-after-iters", 1).code == 0
    result = start(args, partial(interrupted_at, number, function)).wait()
    assert result.code == (-signal.SIGTERM if number == signal.SIGTERM else 130)
    assert (status(save)["status"], status(save)["iteration"], status(save)["saved_iteration"]) == ("signal", None, 1)
    assert not (save / LOCK_NAME).exists()
    assert command(*args).code == 0
    assert iterations(save) == [1, 2, 3, 4]
