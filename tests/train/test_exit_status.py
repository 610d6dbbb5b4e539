"""exit_status.json: how the last job ended, the first failure of several ranks, nothing where nothing was saved."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_lite.checkpoint.catalog import announce
from megatron_lite.errors import CheckpointError, FailedRank
from megatron_lite.train.exit_status import EXIT_STATUS_NAME, ExitRecord, read_exit_status
from megatron_lite.train.stopping import Stop


def end(folder, stop=None, error=None, *, rank=0, begun=True, iteration=7):
    """A rank's job that ends with this stop or error."""
    with ExitRecord(str(folder), rank) as record:
        if begun:
            record.start()
            record.begin(lambda: iteration)
        if error is not None:
            raise error
        record.end(stop)


def test_a_stop_is_written_with_what_is_saved(tmp_path):
    announce(tmp_path, 5)
    end(tmp_path, Stop("time_limit", "exiting program after 3.0 minutes"))
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message) == ("time_limit", "exiting program after 3.0 minutes")
    assert (ended.iteration, ended.saved_iteration, ended.host, ended.rank) == (7, 5, "", None)
    assert ended.time.endswith("+00:00")


def test_of_several_stops_rank_0_writes_one(tmp_path):
    end(tmp_path, Stop("signal", "stopped"), rank=1)
    assert read_exit_status(tmp_path) is None


def test_the_first_of_several_failures_is_kept(tmp_path):
    end(tmp_path, Stop("signal", "of the job before"))
    records = [ExitRecord(str(tmp_path), rank) for rank in range(4)]
    for record in records:
        record.__enter__()
    records[0].start()
    assert read_exit_status(tmp_path) is None
    for rank, text in ((3, "out of memory"), (1, "connection closed by peer"), (0, "the same")):
        fail(records[rank], RuntimeError(text))
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.rank) == ("error", "out of memory", 3)
    assert ended.host == os.uname().nodename


def fail(record, error):
    record.__exit__(type(error), error, None)


@pytest.mark.parametrize("last", [None, "time_limit"])
def test_the_first_failure_is_kept_before_rank_0_has_removed_the_last_jobs_file(tmp_path, last):
    if last:
        end(tmp_path, Stop(last, "of the job before"))
    records = [ExitRecord(str(tmp_path), rank) for rank in range(2)]
    for record in records:
        record.__enter__()
    fail(records[1], RuntimeError("no GPU"))
    records[0].start()
    fail(records[0], RuntimeError("lost rank 1"))
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.rank) == ("error", "no GPU", 1)


def test_a_job_that_is_killed_while_it_loads_leaves_no_word_of_an_earlier_one(tmp_path):
    end(tmp_path, Stop("signal", "of the job before"))
    with ExitRecord(str(tmp_path), 0) as record:
        record.start()
        assert read_exit_status(tmp_path) is None


def test_host_and_rank_are_those_of_the_failure_whoever_writes_it(tmp_path):
    error = CheckpointError("rule", found="on gpu-7, rank 5: no room", fix="fix")
    error.__cause__ = FailedRank("gpu-7", 5)
    try:
        raise CheckpointError("rule", found="with more words", fix="fix") from error
    except CheckpointError as told:
        with pytest.raises(CheckpointError):
            end(tmp_path, error=told, rank=0)
    ended = read_exit_status(tmp_path)
    assert (ended.host, ended.rank) == ("gpu-7", 5)


def test_an_error_before_the_first_iteration_replaces_the_last_jobs_end_unless_that_was_the_runs(tmp_path):
    end(tmp_path, Stop("time_limit", "of the job before"))
    with pytest.raises(ValueError, match="no GPU"):
        end(tmp_path, error=ValueError("no GPU"), begun=False)
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.iteration) == ("error", "no GPU", None)
    end(tmp_path, Stop("completed", "done"))
    with pytest.raises(ValueError, match="typo"):
        end(tmp_path, error=ValueError("typo"), begun=False)
    assert read_exit_status(tmp_path).status == "completed"
    with pytest.raises(ValueError, match="another schedule"), ExitRecord(str(tmp_path), 0) as record:
        record.start()
        assert read_exit_status(tmp_path) is None
        raise ValueError("another schedule")
    assert read_exit_status(tmp_path).status == "completed"


def test_an_interrupt_is_a_signal(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        end(tmp_path, error=KeyboardInterrupt())
    assert read_exit_status(tmp_path).status == "signal"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_a_job_loads_is_written_down(tmp_path, number):
    died_of = []
    before = signal.signal(number, lambda received, _: died_of.append(received))
    try:
        with pytest.raises(KeyboardInterrupt), ExitRecord(str(tmp_path), 0) as record:
            record.start()
            os.kill(os.getpid(), number)
            pytest.fail("the job goes on")
    finally:
        signal.signal(number, before)
    assert died_of == [number]
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message) == ("signal", f"{number.name} received: stopped at once, without saving")


def test_a_signal_does_not_hide_the_error_that_ends_the_job(tmp_path):
    """A rank of torchrun's was killed: its partner looks for why it lost it when SIGTERM comes."""
    with pytest.raises(RuntimeError), ExitRecord(str(tmp_path), 0) as record:
        record.start()
        record.begin(lambda: 7)
        try:
            raise RuntimeError("connection closed by peer")
        except RuntimeError:
            os.kill(os.getpid(), signal.SIGTERM)
            raise
    ended = read_exit_status(tmp_path)
    assert (ended.status, ended.message, ended.iteration) == ("error", "connection closed by peer", 7)


def test_nothing_is_made_for_a_note(tmp_path):
    with pytest.raises(ValueError, match="typo"):
        end(tmp_path / "missing", error=ValueError("typo"), begun=False)
    with pytest.raises(ValueError, match="typo"):
        end("", error=ValueError("typo"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_says_nothing(tmp_path):
    for text in ("", "[]", "{}", '{"status": "completed"}', '{"other": 1}'):
        (tmp_path / EXIT_STATUS_NAME).write_text(text)
        assert read_exit_status(tmp_path) is None


def test_saves_that_failed_are_listed_over_rollbacks_too(tmp_path):
    before, after = [4], []
    with ExitRecord(str(tmp_path), 0) as record:
        record.begin(lambda: 6, before)
        record.begin(lambda: 3)
        record.begin(lambda: 9, after)
        after.append(8)
        record.end(Stop("completed", "done"))
    assert read_exit_status(tmp_path).failed_saves == [4, 8]
