"""Full disk during a save: the run stops or trains on, as configured, and complete checkpoints stay."""

from __future__ import annotations

import io
import os
import resource
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from support.trainer import checkpoints, command, iterations, records, status

from megatron_lite.checkpoint import writing
from megatron_lite.config.arguments import parse_run
from megatron_lite.errors import CheckpointError
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.train.job import train_job

pytestmark = pytest.mark.slow

MODES = [(), ("--async-save",)]
JOB = ("--train-iters", 8, "--save-interval", 2, "--keep-last", 2, "--lr-decay-style", "constant")
LIMIT = 50_000
"""File size limit in bytes: above the size of the logs, below that of a checkpoint."""


def full_disk(*, for_good, after=2):
    """In a job: after the save of iteration `after`, make long writes fail, permanently or for one save."""
    message = Reporter.message
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def listen(self, text):
        if f"successfully saved checkpoint at iteration {after:7d}" in text:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        if "FAILED" in text and not for_good:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        message(self, text)

    Reporter.message = listen


def left_behind(save):
    """Return unexpected files in the folder."""
    known = {"exit_status.json", "metrics.jsonl", "latest_checkpointed_iteration.txt"}
    known |= {"completed_iteration.txt", *checkpoints(save)}
    return {path.name for path in save.iterdir()} - known


@pytest.mark.parametrize("mode", MODES)
def test_a_run_stops_and_its_checkpoints_stay(mode, corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, *mode, "--save", save, "--load", save)
    result = start(args, partial(full_disk, for_good=True)).wait()
    assert result.code == 1
    assert "File too large" in result.err
    assert "the newest complete checkpoint is of iteration 2" in result.err
    assert "--on-failed-save continue" in result.err
    assert (checkpoints(save), left_behind(save)) == (["iter_0000002"], set())
    ended = status(save)
    assert (ended["status"], ended["saved_iteration"], ended["failed_saves"]) == ("error", 2, [4])
    assert command(*args).code == 0
    assert status(save)["failed_saves"] == []


def test_a_failed_background_save_is_reported_before_the_next_save(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--train-iters", 500, "--save-schedule", "2:4 1000", "--async-save", "--save", save)
    args = [word for position, word in enumerate(args) if "--save-interval" not in args[position - 1 : position + 1]]
    assert start(args, partial(full_disk, for_good=True)).wait().code == 1
    assert status(save)["failed_saves"] == [4]
    assert status(save)["iteration"] < 500


@pytest.mark.parametrize("mode", MODES)
def test_a_run_continues_and_saves_again(mode, corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, *mode, "--save", save, "--on-failed-save", "continue")
    result = start(args, partial(full_disk, for_good=False)).wait()
    assert result.code == 0, result.err
    (told,) = [record["text"] for record in records(save) if "FAILED" in str(record.get("text"))]
    assert told in result.out
    assert told.startswith("WARNING: the save of iteration 4 ")
    assert "File too large" in told and "the newest complete checkpoint is of iteration 2" in told
    assert (checkpoints(save), left_behind(save)) == (["iter_0000006", "iter_0000008"], set())
    ended = status(save)
    assert (ended["status"], ended["saved_iteration"], ended["failed_saves"]) == ("completed", 8, [4])
    assert command("checkpoint", "verify", save).code == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("stop", "failed"), [((), [4, 6, 8]), (("--exit-interval", 5), [4, 5])])
def test_the_last_save_of_a_job_must_succeed(mode, stop, failed, corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, *mode, *stop, "--save", save, "--keep-last", 1, "--on-failed-save", "continue")
    result = start(args, partial(full_disk, for_good=True)).wait()
    assert result.code == 1
    assert "the newest complete checkpoint is of iteration 2" in result.err
    assert (checkpoints(save), left_behind(save)) == (["iter_0000002"], set()), "retention keeps what is whole"
    ended = status(save)
    assert (ended["status"], ended["saved_iteration"], ended["failed_saves"]) == ("error", 2, failed)


def die_before_latest(iteration):
    """Kill a job with SIGKILL when this checkpoint has its final name and is not recorded as the latest yet."""
    set_latest = writing.set_latest

    def die(root, number):
        if number == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        set_latest(root, number)

    writing.set_latest = die


def test_a_checkpoint_not_yet_recorded_as_latest_is_resumed(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--load", save)
    assert start(args, partial(die_before_latest, 4)).wait().code == -signal.SIGKILL
    assert (save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "2\n"
    result = command(*args)
    assert result.code == 0, result.err
    assert "iter_0000004 is complete, and the job that saved it was killed before it was recorded" in result.out
    assert iterations(save) == list(range(1, 9))
    assert checkpoints(save) == ["iter_0000006", "iter_0000008"]


def test_a_weights_only_save_fails_in_the_same_way(corpus, start, tmp_path):
    save = tmp_path / "run"
    args = corpus.job(*JOB, "--save", save, "--weights-only-every", 3, "--on-failed-save", "continue")
    result = start(args, partial(full_disk, for_good=False)).wait()
    assert result.code == 0, result.err
    assert status(save)["failed_saves"] == [3]
    assert checkpoints(save / "weights") == ["iter_0000006"]


class FullDisk(io.FileIO):
    """File on a full disk."""

    def write(self, data):
        raise OSError(28, "No space left on device")


def full_on_rank_1(backend, args, *, for_good):
    """Run on one rank; the disk of rank 1 is full after the first save, even for the failure record."""
    config = parse_run(args, world_size=backend.world_size).config
    with ExitStack() as stack:
        if backend.rank == 1:
            refuse = SecondFileFull(for_good)
            stack.enter_context(mock.patch.object(writing, "FileIO", refuse.open))
            stack.enter_context(mock.patch.object(writing.CheckpointWriter, "report_failure", refuse.record))
        try:
            with ExitRecord(config.checkpoint.save, backend.launch) as record:
                train_job(config, record, started=time.monotonic(), backend=backend)
        except CheckpointError as error:
            return str(error)
    return None


class SecondFileFull:
    """Opener of files that are full in the second save, or in all saves from then on."""

    def __init__(self, for_good):
        self.for_good, self.opened = for_good, 0

    def open(self, path, mode):
        self.opened += 1
        full = self.opened >= 2 if self.for_good else self.opened == 2
        return (FullDisk if full else io.FileIO)(path, mode)

    def record(self, error):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_of_one_rank_fails_the_save_on_all(mode, corpus, on_ranks, tmp_path):
    save = tmp_path / "run"
    args = [str(word) for word in corpus.job(*JOB, *mode, "--save", save)][1:]
    # Rank 0 must not wait for the record that rank 1 cannot write; on_ranks has a timeout.
    errors = on_ranks(2, partial(full_on_rank_1, for_good=False), [*args, "--on-failed-save", "continue"])
    assert errors == [None, None]
    assert (checkpoints(save), left_behind(save)) == (["iter_0000006", "iter_0000008"], set())
    assert status(save)["failed_saves"] == [4]
    (told,) = [record["text"] for record in records(save) if "FAILED" in str(record.get("text"))]
    assert "rank 1: " in told and "No space left on device" in told

    stopped = tmp_path / "stopped"
    args[args.index(str(save))] = str(stopped)
    errors = on_ranks(2, partial(full_on_rank_1, for_good=True), args)
    assert all("rank 1: " in error and "No space left on device" in error for error in errors), errors
    assert (checkpoints(stopped), left_behind(stopped)) == (["iter_0000002"], set())
    assert Path(stopped / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "2\n"
