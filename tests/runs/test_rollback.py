"""Rollback of a folder of checkpoints, also when killed at any step."""

from __future__ import annotations

import os
import shutil
import signal
import sys

import pytest

from megatron_lite.checkpoint.verify import verify_checkpoint
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import find_checkpoint, is_complete
from megatron_lite.runs.exit_status import ExitStatus, completed_iteration, read_exit_status
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.runs.rollback import ROLLBACKS_NAME, automatic_rollbacks, roll_back


def saved(kit, root, iterations):
    for iteration in iterations:
        kit.save(root, iteration)
    return root


def names(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("iter_"))


def test_later_checkpoints_are_moved_aside(kit, tmp_path):
    saved(kit, tmp_path, (10, 20, 30))
    saved(kit, tmp_path / "weights", (5, 15, 25))
    report = roll_back(tmp_path, 10)
    assert report.moved == ("iter_0000020", "iter_0000030")
    assert names(tmp_path) == ["iter_0000010"]
    assert names(report.aside) == ["iter_0000020", "iter_0000030"]
    assert names(report.aside / "weights") == ["iter_0000015", "iter_0000025"]
    assert find_checkpoint(str(tmp_path)).name == "iter_0000010"
    assert find_checkpoint(str(tmp_path / "weights")).name == "iter_0000005"
    verify_checkpoint(report.aside / "iter_0000030")
    saved(kit, tmp_path, (20,))
    assert roll_back(tmp_path, 10).aside.name == "rolled-back-2"
    assert automatic_rollbacks(tmp_path) == 0
    roll_back(tmp_path, 10, automatic=True)
    assert automatic_rollbacks(tmp_path) == 1


def test_a_complete_run_is_not_complete_after_a_rollback(kit, tmp_path):
    saved(kit, tmp_path, (10, 20))
    (tmp_path / "completed_iteration.txt").write_text("20\n")
    (tmp_path / "exit_status.json").write_bytes(ExitStatus(status="completed", message="done", iteration=20).encode())
    roll_back(tmp_path, 20)
    assert completed_iteration(tmp_path) == 20
    roll_back(tmp_path, 10)
    status = read_exit_status(tmp_path)
    assert completed_iteration(tmp_path) is None
    assert (status.status, status.iteration, status.saved_iteration) == ("rolled_back", 10, 10)


def test_skipped_ranges_are_merged(kit, tmp_path):
    saved(kit, tmp_path, (1,))
    roll_back(tmp_path, 1, (50, 60))
    report = roll_back(tmp_path, 1, (60, 70))
    assert report.skipped == ((50, 70),)
    assert read_manifest(tmp_path / "iter_0000001").provenance.skipped_samples == ((50, 70),)
    verify_checkpoint(tmp_path / "iter_0000001")


def test_a_rollback_to_a_damaged_checkpoint_is_refused(kit, tmp_path):
    saved(kit, tmp_path, (10, 20))
    (tmp_path / "iter_0000010" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing; complete checkpoints in .*: iter_0000020"):
        roll_back(tmp_path, 10)
    assert names(tmp_path) == ["iter_0000010", "iter_0000020"]
    assert not (tmp_path / ROLLBACKS_NAME).exists()


def finishes(step, root):
    """Roll back in a process that is killed before its n-th change to a folder; return whether it finished before."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in ("os.rename", "os.remove", "os.mkdir") or (writes and str(arguments[0]).startswith(str(root))):
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(hook)
        try:
            roll_back(root, 10, (40, 52), automatic=True)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == 0


@pytest.mark.slow
def test_killed_at_every_step_a_rollback_loses_nothing_and_can_be_finished(kit, tmp_path):
    start, steps = saved(kit, tmp_path / "start", (10, 20, 30)), 0
    saved(kit, start / "weights", (5, 25))
    while True:
        root = tmp_path / f"step{steps}"
        shutil.copytree(start, root)
        if finishes(steps, root):
            break
        # The latest is complete, and all checkpoints still exist.
        assert find_checkpoint(str(root)).name in ("iter_0000010", "iter_0000030")
        found = [path for path in root.rglob("iter_*") if path.is_dir()]
        assert len(found) == 5
        assert all(is_complete(path) for path in found)
        # Automatic rollbacks are counted first, so that the count is never too small once anything has moved.
        assert names(root) == ["iter_0000010", "iter_0000020", "iter_0000030"] or automatic_rollbacks(root) == 1
        roll_back(root, 10, (40, 52))
        assert names(root) == ["iter_0000010"]
        assert read_manifest(root / "iter_0000010").provenance.skipped_samples == ((40, 52),)
        assert names(root / "weights") == ["iter_0000005"]
        assert find_checkpoint(str(root)).name == "iter_0000010"
        assert find_checkpoint(str(root / "weights")).name == "iter_0000005"
        steps += 1
    assert steps > 8
