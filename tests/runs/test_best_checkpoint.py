"""The best checkpoint: loading by name, retention, rollback, incomplete records."""

import pytest

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import BEST_NAME, best_iteration, find_checkpoint, resolve_best
from megatron_lite.runs.retention import Retention
from megatron_lite.runs.rollback import roll_back


def test_the_best_is_loaded_by_name_and_kept(kit, tmp_path):
    for iteration in (1, 2, 3, 4):
        kit.save(tmp_path, iteration, best=iteration == 2, retention=Retention(1))
    assert best_iteration(tmp_path) == 2
    assert find_checkpoint(str(tmp_path / "best")).name == "iter_0000002"
    assert find_checkpoint(str(tmp_path)).name == "iter_0000004"
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    kit.save(tmp_path, 5, best=True, retention=Retention(1))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000005"]
    with pytest.raises(CheckpointError, match="--load-iteration 2 asks for another"):
        find_checkpoint(str(tmp_path / "best"), 2)


def test_without_a_best_checkpoint(kit, tmp_path):
    kit.save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=rf"no best checkpoint is recorded in {tmp_path} .*--save-best"):
        find_checkpoint(str(tmp_path / "best"))
    assert find_checkpoint(str(tmp_path / "elsewhere" / "best")) is None


def test_a_run_may_be_named_best(kit, tmp_path):
    kit.save(tmp_path / "best", 1)
    assert resolve_best(tmp_path / "best") == tmp_path / "best"
    assert find_checkpoint(str(tmp_path / "best")).name == "iter_0000001"


def test_a_best_checkpoint_that_was_removed(kit, tmp_path):
    kit.save(tmp_path, 1)
    (tmp_path / BEST_NAME).write_text("7\n")
    with pytest.raises(CheckpointError, match=r"Cannot load iter_0000007: .* does not exist; complete.*iter_0000001"):
        find_checkpoint(str(tmp_path / "best"))


def test_a_rollback_forgets_a_later_best(kit, tmp_path):
    for iteration in (1, 2):
        kit.save(tmp_path, iteration, best=True)
    roll_back(tmp_path, 1)
    assert best_iteration(tmp_path) is None
