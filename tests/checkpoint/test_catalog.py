"""What a load finds in a folder, whatever state a save, a kill or a person left it in."""

from __future__ import annotations

import shutil

import pytest

from megatron_lite.checkpoint import catalog
from megatron_lite.checkpoint.catalog import announce, find_checkpoint, is_complete, list_checkpoints, remove_stale
from megatron_lite.errors import CheckpointError


@pytest.fixture
def root(kit, tmp_path):
    for iteration in (10, 20, 12345678):
        kit.save(tmp_path, iteration)
    return tmp_path


def test_list_is_by_iteration_and_whole_ones_only(root):
    (root / "iter_0000015").mkdir()
    (root / "iter_0000010" / "__0_0.distcp").unlink()
    (root / "iter_0000030.partial-00ff00ff").mkdir()
    (root / "notes").mkdir()
    assert [path.name for path in list_checkpoints(root)] == ["iter_0000020", "iter_12345678"]
    assert list_checkpoints(root / "missing") == []


def test_the_announced_one_is_taken_even_if_a_person_moved_it_back(root):
    assert find_checkpoint(str(root)).name == "iter_12345678"
    announce(root, 10)
    assert find_checkpoint(str(root)).name == "iter_0000010"
    (root / "latest_checkpointed_iteration.txt").write_text(" 20 \n")
    assert find_checkpoint(str(root)).name == "iter_0000020"


def test_by_folder_and_by_iteration(root):
    assert find_checkpoint(str(root / "iter_0000010")).name == "iter_0000010"
    assert find_checkpoint(str(root), 20).name == "iter_0000020"
    with pytest.raises(CheckpointError, match=r"iter_0000021 is not there.*holds iter_0000010, iter_0000020"):
        find_checkpoint(str(root), 21)
    with pytest.raises(CheckpointError, match="must agree"):
        find_checkpoint(str(root / "iter_0000010"), 20)
    (root / "iter_0000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="iter_0000010 is incomplete"):
        find_checkpoint(str(root / "iter_0000010"))


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path):
    assert find_checkpoint(str(tmp_path / "missing")) is None
    (tmp_path / "iter_0000001.partial-0a0b0c0d").mkdir()
    assert find_checkpoint(str(tmp_path)) is None


def test_a_lost_announcement_or_checkpoint_is_said(root):
    told = []
    shutil.rmtree(root / "iter_12345678")
    assert find_checkpoint(str(root), notify=told.append).name == "iter_0000020"
    assert "says 12345678 but iter_12345678 is missing or incomplete: taking iter_0000020" in told[0]
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert find_checkpoint(str(root), notify=told.append).name == "iter_0000020"
    assert "is missing: taking the newest" in told[1]


@pytest.mark.parametrize("text", ["5", "release", "global_step10", ""])
def test_an_announcement_that_leads_nowhere_is_an_error_not_a_fresh_start(root, text):
    (root / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match=f"announces '{text}'"):
        find_checkpoint(str(root))


def test_saving_an_iteration_again_replaces_it(kit, root):
    (root / "iter_0000020" / "old").touch()
    kit.save(root, 20)
    assert not (root / "iter_0000020" / "old").exists()
    assert find_checkpoint(str(root)).name == "iter_0000020"
    assert not list(root.glob("*.replaced"))


def test_killed_between_the_two_renames_of_a_replacement(kit, root, monkeypatch):
    (root / "iter_0000020").rename(root / "iter_0000020.replaced")
    announce(root, 20)
    assert find_checkpoint(str(root)).name == "iter_0000020"
    assert not (root / "iter_0000020.replaced").exists()
    # … and just after the second: the new one stays, the old one goes at the next save.
    shutil.copytree(root / "iter_0000010", root / "iter_0000010.replaced")
    assert remove_stale(root) == ["iter_0000010.replaced"]
    assert is_complete(root / "iter_0000010")


def test_a_save_that_cannot_be_renamed_leaves_the_older_one(kit, root, monkeypatch):
    def refuse(partial, checkpoint):
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.replaced"))
        raise OSError(5, "Input/output error")

    before = (root / "iter_0000020" / "manifest.json").read_bytes()
    announce(root, 20)
    monkeypatch.setattr("megatron_lite.checkpoint.save.make_visible", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        kit.save(root, 20)
    assert find_checkpoint(str(root)).name == "iter_0000020"
    assert (root / "iter_0000020" / "manifest.json").read_bytes() == before


def test_what_killed_saves_left_goes_with_the_next_save(kit, root):
    for name in ("iter_0000030.partial-00ff00ff", "iter_0000010.deleted-0a0b0c0d", "iter_0000010.partial-mine"):
        (root / name).mkdir()
        (root / name / "__0_0.distcp").touch()
    (root / "latest_checkpointed_iteration.txt.00ff00ff.tmp").touch()
    report = kit.save(root, 40)
    assert report.removed == (
        "iter_0000010.deleted-0a0b0c0d",
        "iter_0000030.partial-00ff00ff",
        "latest_checkpointed_iteration.txt.00ff00ff.tmp",
    )
    assert (root / "iter_0000010.partial-mine").exists()


def test_the_name_grows_with_the_iteration():
    assert catalog.folder_name(100) == "iter_0000100"
    assert catalog.folder_name(123456789) == "iter_123456789"
