"""Lock on a --save folder: one owner at a time, with killed, stopped and racing processes, on one host or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.errors import CheckpointError
from megatron_lite.runs import lock as lock_module
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.lock_file import LOCK_NAME, Owner, read_owner
from megatron_lite.runs.process import is_running, start_of, this_process

FORK = multiprocessing.get_context("fork")


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def new_lock(tmp_path, clock):
    """Makes locks on tmp_path/run; each is released at the end."""
    made = []

    def make(**changes):
        made.append(
            FolderLock(tmp_path / "run", process=this_process("here"), command="train", clock=clock, notify=told.append)
        )
        made[-1]._process = replace(made[-1]._process, **changes)
        return made[-1]

    told = []
    make.told = told
    yield make
    for lock in made:
        lock.release()


ELSEWHERE = {"host": "there", "machine": "another kernel"}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_lock_is_taken_held_and_removed(new_lock, tmp_path):
    lock = new_lock()
    assert lock.attempt()
    owner = read_owner(tmp_path / "run")
    assert (owner.process.host, owner.process.pid, owner.command) == ("here", os.getpid(), "train")
    assert owner.token == lock.token
    lock.verify(now=True)
    lock.release()
    assert read_owner(tmp_path / "run") is None
    assert files(tmp_path) == ["run"]
    lock.release()
    assert new_lock().attempt()


def test_a_second_process_is_refused_and_writes_nothing(new_lock, tmp_path):
    assert new_lock().attempt()
    before = content(tmp_path)
    with pytest.raises(CheckpointError) as error:
        second = new_lock()
        assert not second.attempt()
        second.attempt()
    assert f"process {os.getpid()} on here (train, since " in error.value.problem
    assert "last heartbeat" in error.value.problem
    assert f"end it (`kill {os.getpid()}` on" in error.value.fix
    assert not new_lock().try_acquire()
    assert content(tmp_path) == before


def test_a_stopped_owner_keeps_the_lock_and_is_named_as_stopped(new_lock, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert new_lock(pid=child.pid, start=start_of(child.pid)).attempt()
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        second = new_lock()
        assert not second.attempt()
        with pytest.raises(CheckpointError, match="kill -CONT"):
            second.attempt()
        child.kill()


@pytest.mark.parametrize("changes", [{"start": "1"}, {"pid": 2**22 - 1}])
def test_the_lock_of_an_ended_process_is_stale_at_once_even_if_its_pid_is_reused(changes, new_lock):
    if changes.get("start") and not Path("/proc/self/stat").exists():
        pytest.skip("start times are read from /proc")
    assert new_lock(**changes).attempt()
    second = new_lock()
    assert second.attempt()
    assert len(new_lock.told) == 1
    assert "taking over the lock of" in new_lock.told[0]
    second.verify(now=True)


def test_the_lock_of_a_zombie_is_stale(new_lock):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = replace(this_process("here"), pid=child.pid, start=start_of(child.pid))
    assert is_running(identity)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_running(identity) is False
    child.wait()
    child.stdin.close()


def test_another_machines_lock_is_taken_over_only_without_heartbeats(new_lock, clock):
    owner = new_lock(**ELSEWHERE)
    assert owner.attempt()
    second = new_lock()
    for _ in range(44):
        assert not second.attempt()
        clock.now += 1
    assert not second.attempt()
    assert "waiting up to 45 s for its next heartbeat" in new_lock.told[0]
    owner._beat()
    clock.now += 1
    with pytest.raises(CheckpointError, match=r"in use by process .* on there"):
        second.attempt()

    third = new_lock()
    assert not third.attempt()
    clock.now += 46
    assert third.attempt()
    with pytest.raises(CheckpointError, match=r"This job has lost the lock .*: process .* on here .* holds it now"):
        owner.verify(now=True)
    owner.release()
    third.verify(now=True)


def test_try_acquire_does_not_wait_for_another_machine(new_lock):
    assert new_lock(**ELSEWHERE).attempt()
    assert not new_lock().try_acquire()


@pytest.mark.parametrize(("restarts", "stale"), [(2, True), (1, False), (0, False)])
def test_a_requeued_slurm_job_takes_over_from_its_earlier_start_at_once(restarts, stale, new_lock):
    assert new_lock(**ELSEWHERE, slurm_job="77", slurm_restarts=1).attempt()
    assert new_lock(slurm_job="77", slurm_restarts=restarts).attempt() is stale
    assert new_lock(slurm_job="78", slurm_restarts=restarts).attempt() is False


def test_text_of_a_process():
    assert str(this_process("here", "77", 3)) == f"process {os.getpid()} on here, Slurm job 77 (restart 3)"


def test_an_overdue_owner_verifies_and_a_removed_lock_is_lost(new_lock, clock, tmp_path):
    lock = new_lock()
    assert lock.attempt()
    (entry,) = (tmp_path / "run" / LOCK_NAME).iterdir()
    entry.unlink()
    lock.verify()  # its last heartbeat is fresh
    clock.now += 31
    with pytest.raises(CheckpointError, match="the file was removed"):
        lock.verify()
    with pytest.raises(CheckpointError):
        lock.verify()


def test_a_paused_owner_leaves_the_new_owners_lock_alone(new_lock, tmp_path):
    paused = new_lock(start="1")
    assert paused.attempt()
    second = new_lock()
    assert second.attempt()
    held = content(tmp_path)
    paused._beat()
    paused.release()
    assert content(tmp_path) == held
    second.verify(now=True)


def test_heartbeats_are_sent(new_lock, monkeypatch, tmp_path):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    beaten = threading.Event()
    beat = FolderLock._beat

    def note(self):
        beat(self)
        beaten.set()

    monkeypatch.setattr(FolderLock, "_beat", note)
    lock = new_lock()
    assert lock.attempt()
    (before,) = (tmp_path / "run" / LOCK_NAME).iterdir()
    assert beaten.wait(30)
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 60)
    assert not before.exists()
    assert read_owner(tmp_path / "run").token == lock.token


def race(folder, ready, results):
    lock = FolderLock(folder, process=this_process("here"), command="train")
    ready.wait()
    took = False
    try:
        for _ in range(5):
            took = took or lock.attempt()
    except CheckpointError:
        pass
    results.put((os.getpid(), took))
    if took:
        ready.wait()  # alive until all others have been refused
        lock.verify(now=True)
        results.put((os.getpid(), "held"))
    else:
        ready.wait()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["free", "stale", "empty"])
def test_one_of_many_racing_processes_gets_the_lock(state, tmp_path):
    folder = tmp_path / "run"
    for _ in range(5):
        if state == "empty":
            (folder / LOCK_NAME).mkdir(parents=True, exist_ok=True)
        if state == "stale":
            dead = FolderLock(folder, process=this_process("here"), command="train")
            dead._process = replace(dead._process, pid=2**22 - 1)
            assert dead.attempt()
        ready, results = FORK.Barrier(6), FORK.Queue()
        jobs = [FORK.Process(target=race, args=(folder, ready, results)) for _ in range(6)]
        for job in jobs:
            job.start()
        answers = [results.get(timeout=60) for _ in range(7)]
        for job in jobs:
            job.join(60)
            assert job.exitcode == 0
        winners = [pid for pid, took in answers if took is True]
        assert len(winners) == 1, answers
        assert (winners[0], "held") in answers
        assert len(files(folder)) == 2, files(folder)
        assert files(folder)[0] == LOCK_NAME
        # The winner ended without releasing it.
        lock = FolderLock(folder, process=this_process("here"), command="train")
        assert lock.try_acquire()
        lock.release()
        assert files(folder) == []


def test_remains_of_killed_processes_are_removed(new_lock, tmp_path):
    (tmp_path / "run" / f"{LOCK_NAME}.0123").mkdir(parents=True)
    assert new_lock().attempt()
    assert files(tmp_path / "run")[0] == LOCK_NAME
    assert len(files(tmp_path / "run")) == 2


def test_a_damaged_lock_is_treated_like_another_machines(new_lock, clock, tmp_path):
    (tmp_path / "run" / LOCK_NAME).mkdir(parents=True)
    (tmp_path / "run" / LOCK_NAME / "who.5").write_text("not ours")
    lock = new_lock()
    assert not lock.attempt()
    clock.now += 1
    assert not lock.attempt()
    assert "a job that cannot be identified (who.5)" in new_lock.told[0]
    clock.now += 45
    assert lock.attempt()


def test_an_owner_of_another_version_is_not_decoded():
    assert Owner.decode(b"{}") is None
    assert Owner.decode(b"[]") is None
    assert Owner.decode(b'{"process": 1}') is None


def test_the_lock_needs_no_torch(tmp_path):
    code = "import sys, megatron_lite.runs.lock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
