"""Exit record: status of the last job, first failure of several ranks, no writes to another job's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.backend.environment import Launch
from megatron_lite.errors import CheckpointError, FailedRank
from megatron_lite.lifecycle import exit_status
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.runs.catalog import set_latest
from megatron_lite.runs.exit_status import COMPLETED_NAME, EXIT_STATUS_NAME, completed_iteration, read_exit_status
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.lock_file import LOCK_NAME

HOST = "gpu-0"


def launched(rank=0, world=1, **more):
    return Launch(rank=rank, world_size=world, host=HOST, **more)


def end(folder, status="", message="", *, error=None, launch=None, begun=True, iteration=7):
    """A job of one rank that ends like this."""
    with ExitRecord(str(folder), launch or launched()) as record:
        if begun:
            record.start(record.attempt(0.0))
            record.begin(lambda: iteration)
        if error is not None:
            raise error
        record.end(status, message)


def fail(record, error):
    record.__exit__(type(error), error, None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_stop_is_written_with_what_is_saved(tmp_path):
    set_latest(tmp_path, 5)
    end(tmp_path, "time_limit", "exiting program after 3.0 minutes")
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message) == ("time_limit", "exiting program after 3.0 minutes")
    assert (ended.iteration, ended.saved_iteration, ended.host, ended.rank) == (7, 5, HOST, None)
    assert ended.time.endswith("+00:00")
    assert LOCK_NAME not in names(tmp_path)


def test_rank_0_writes_a_stop_of_all_ranks_once(tmp_path):
    with ExitRecord(str(tmp_path), launched(1, 2)) as record:
        record.end("signal", "stopped")
    assert read_exit_status(tmp_path) is None


def test_the_first_of_several_failures_is_kept(tmp_path):
    end(tmp_path, "signal", "of the job before")
    records = [ExitRecord(str(tmp_path), launched(rank, 4)) for rank in range(4)]
    for record in records:
        record.__enter__()
    token = records[0].attempt(0.0)
    for record in records:
        record.start(token)
    assert read_exit_status(tmp_path) is None
    for rank, text in ((3, "out of memory"), (1, "connection closed by peer"), (0, "the same")):
        fail(records[rank], RuntimeError(text))
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.rank, ended.host) == ("error", "out of memory", 3, HOST)


@pytest.mark.parametrize("last", [None, "time_limit"])
@pytest.mark.parametrize("end_of_rank_0", [RuntimeError("lost rank 1"), KeyboardInterrupt()])
def test_the_first_failure_is_kept_before_rank_0_has_the_lock(tmp_path, last, end_of_rank_0):
    """Also where the launcher's SIGTERM, which follows from it, ends rank 0."""
    if last:
        end(tmp_path, last, "of the job before")
    records = [ExitRecord(str(tmp_path), launched(rank, 2)) for rank in range(2)]
    for record in records:
        record.__enter__()
    fail(records[1], RuntimeError("no GPU"))
    records[0].start(records[0].attempt(0.0))
    fail(records[0], end_of_rank_0)
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.rank) == ("error", "no GPU", 1)


def test_a_late_rank_0_keeps_the_failure_of_its_own_job(tmp_path):
    for start, status in (("Slurm step 7.0, restart 0.0", "error"), ("Slurm step 7.0, restart 1.0", "signal")):
        first = ExitRecord(str(tmp_path), launched(1, 2, start_id="Slurm step 7.0, restart 0.0"))
        first.__enter__()
        fail(first, RuntimeError("no GPU"))
        late = ExitRecord(str(tmp_path), launched(0, 2, start_id=start))
        late.__enter__()
        fail(late, KeyboardInterrupt())
        assert read_exit_status(tmp_path).status == status


def test_the_last_jobs_file_is_removed_on_entry(tmp_path):
    """A job that is killed while it imports or loads says nothing, and neither does the one before."""
    end(tmp_path, "signal", "of the job before")
    with ExitRecord(str(tmp_path), launched()):
        assert read_exit_status(tmp_path) is None
        assert LOCK_NAME not in names(tmp_path)


def test_host_and_rank_are_of_the_first_failure(tmp_path):
    error = CheckpointError("on gpu-7, rank 5: no room", fix="fix")
    error.__cause__ = FailedRank("gpu-7", 5)
    try:
        raise CheckpointError("with more words", fix="fix") from error
    except CheckpointError as told:
        with pytest.raises(CheckpointError):
            end(tmp_path, error=told)
    ended = read_exit_status(tmp_path)
    assert (ended.host, ended.rank) == ("gpu-7", 5)


@pytest.mark.parametrize("last", ["time_limit", "completed", "signal"])
@pytest.mark.parametrize("begun", [True, False])
def test_an_error_replaces_any_status_of_the_last_job(tmp_path, last, begun):
    end(tmp_path, last, "of the job before")
    with pytest.raises(ValueError, match="no GPU"):
        end(tmp_path, error=ValueError("no GPU"), begun=begun)
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.host, ended.rank) == ("error", "no GPU", HOST, 0)
    assert ended.iteration == (7 if begun else None)


def test_a_run_counts_as_complete_until_a_job_trains_there_again(tmp_path):
    end(tmp_path, "completed", "done")
    assert completed_iteration(tmp_path) == 7
    with pytest.raises(ValueError, match="typo"):
        end(tmp_path, error=ValueError("typo"), begun=False)
    with ExitRecord(str(tmp_path), launched()) as record:  # --skip-train
        record.start(record.attempt(0.0))
        record.begin(lambda: 7, trains=False)
        record.end("evaluated", "evaluation is complete")
    assert completed_iteration(tmp_path) == 7
    end(tmp_path, "signal", "stopped while training on")
    assert completed_iteration(tmp_path) is None
    (tmp_path / COMPLETED_NAME).write_text("nonsense")
    assert completed_iteration(tmp_path) is None


def test_an_interrupt_is_a_signal_unless_the_job_has_ended_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        end(tmp_path, error=KeyboardInterrupt())
    assert (read_exit_status(tmp_path).status, read_exit_status(tmp_path).host) == ("signal", HOST)
    with pytest.raises(KeyboardInterrupt), ExitRecord(str(tmp_path), launched()) as record:
        record.start(record.attempt(0.0))
        record.begin(lambda: 7)
        record.end("completed", "done")
        raise KeyboardInterrupt
    assert read_exit_status(tmp_path).status == "completed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_start_up_is_written(tmp_path, number, capfd):
    died_of = []
    before = signal.signal(number, lambda received, _: died_of.append(received))
    try:
        with pytest.raises(KeyboardInterrupt), ExitRecord(str(tmp_path), launched()) as record:
            record.start(record.attempt(0.0))
            os.kill(os.getpid(), number)
            pytest.fail("the job goes on")
    finally:
        signal.signal(number, before)
    assert died_of == [number]
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message) == ("signal", f"{number.name} received: stopped at once, without saving")
    assert f"{number.name} received: stopping at once, without saving" in capfd.readouterr().err
    assert LOCK_NAME not in names(tmp_path)


def test_a_signal_does_not_hide_the_error_that_ends_the_job(tmp_path):
    """A rank of torchrun's was killed: its partner looks for why it lost it when SIGTERM comes."""
    with pytest.raises(RuntimeError), ExitRecord(str(tmp_path), launched()) as record:
        record.start(record.attempt(0.0))
        record.begin(lambda: 7)
        try:
            raise RuntimeError("connection closed by peer")
        except RuntimeError:
            os.kill(os.getpid(), signal.SIGTERM)
            raise
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.iteration) == ("error", "connection closed by peer", 7)


@pytest.mark.slow
def test_a_signal_during_a_handled_error_takes_effect(tmp_path):
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt), ExitRecord(str(tmp_path), launched()):
            try:
                raise ImportError("optional")
            except ImportError:
                os.kill(os.getpid(), signal.SIGUSR1)
            signal.sigtimedwait([], 30)
            pytest.fail("the signal is lost")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert read_exit_status(tmp_path).status == "signal"


def test_an_error_creates_no_folder(tmp_path):
    with pytest.raises(ValueError, match="typo"):
        end(tmp_path / "missing", error=ValueError("typo"), begun=False)
    with pytest.raises(ValueError, match="typo"):
        end("", error=ValueError("typo"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_format_is_no_status(tmp_path):
    for text in ("", "[]", "{}", '{"status": "completed"}', '{"other": 1}'):
        (tmp_path / EXIT_STATUS_NAME).write_text(text, encoding="utf-8")
        assert read_exit_status(tmp_path) is None


def test_failed_saves_are_listed_across_rollbacks(tmp_path):
    before, after = [4], []
    with ExitRecord(str(tmp_path), launched()) as record:
        record.start(record.attempt(0.0))
        record.begin(lambda: 6, before)
        record.begin(lambda: 3)
        record.begin(lambda: 9, after)
        after.append(8)
        record.end("completed", "done")
    assert read_exit_status(tmp_path).failed_saves == [4, 8]


@pytest.fixture
def other_job(tmp_path):
    """A job with a lock on tmp_path, and the files that it has written."""
    (tmp_path / EXIT_STATUS_NAME).write_text("the other job's\n")
    lock = FolderLock(tmp_path, process=launched().process, command="train")
    lock.acquire()
    yield lock
    lock.release()


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("typo"), KeyboardInterrupt()])
@pytest.mark.parametrize("tries", [True, False])
def test_nothing_is_written_to_another_jobs_folder(other_job, tmp_path, error, tries):
    before = content(tmp_path)
    with pytest.raises((ValueError, KeyboardInterrupt)), ExitRecord(str(tmp_path), launched()) as record:
        if tries:
            with pytest.raises(CheckpointError, match="is in use by process"):
                record.attempt(5.0)
            record.start(None)
        raise error
    assert content(tmp_path) == before


@pytest.mark.slow
def test_a_refused_job_writes_nothing_even_after_the_other_has_ended(other_job, tmp_path):
    with pytest.raises(CheckpointError), ExitRecord(str(tmp_path), launched()) as record:
        try:
            record.attempt(5.0)
        except CheckpointError:
            record.start(None)
            other_job.release()
            raise
    assert (tmp_path / EXIT_STATUS_NAME).read_text(encoding="utf-8") == "the other job's\n"


def test_a_file_that_another_job_wrote_during_the_wait_is_not_this_jobs(other_job, tmp_path, monkeypatch):
    (tmp_path / EXIT_STATUS_NAME).unlink()
    record = ExitRecord(str(tmp_path), launched(0, 2))
    record.__enter__()
    assert record.attempt(0.0) is None
    (tmp_path / EXIT_STATUS_NAME).write_text("the other job's\n")
    other_job.release()
    assert record.attempt(0.0)
    assert read_exit_status(tmp_path) is None
    assert EXIT_STATUS_NAME not in names(tmp_path)
    fail(record, ValueError("no GPU"))


def test_a_job_that_lost_its_lock_writes_nothing_more(tmp_path):
    with pytest.raises(CheckpointError, match="has lost the lock"), ExitRecord(str(tmp_path), launched()) as record:
        record.start(record.attempt(0.0))
        lock = record.lock
        lock._process = replace(lock._process, pid=2**22 - 1)
        (entry,) = (tmp_path / LOCK_NAME).iterdir()
        entry.rename(entry.with_name("thief.9"))
        lock.verify(now=True)
    assert names(tmp_path) == [LOCK_NAME]


def test_an_abort_from_another_thread_is_written_and_releases_the_lock(tmp_path):
    with ExitRecord(str(tmp_path), launched(0, 2)) as record:
        record.start(record.attempt(0.0))
        record.abort("gpu-7", 3, "gave no sign of life")
        assert LOCK_NAME not in names(tmp_path)
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.host, ended.rank) == ("error", "gave no sign of life", "gpu-7", 3)


def test_lifecycle_and_the_command_import_no_torch():
    """Except for the node check, which measures devices when training starts."""
    names = [path.stem for path in Path(exit_status.__file__).parent.glob("*.py")]
    modules = [f"megatron_lite.lifecycle.{name}" for name in names if not name.startswith("node_")]
    code = f"import sys, megatron_lite.cli.train, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert len(modules) > 3
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
