"""Finding the checkpoint to load, in folders that saves, kills and people left in any state."""

from __future__ import annotations

import os
import shutil

import pytest

from megatron_lite.errors import CheckpointError
from megatron_lite.runs import catalog
from megatron_lite.runs.catalog import (
    find_checkpoint,
    is_complete,
    latest_problem,
    list_checkpoints,
    set_latest,
    unrecorded_iteration,
)
from megatron_lite.runs.manifest import CorruptCheckpointError
from megatron_lite.runs.turnover import make_visible, remove_stale


@pytest.fixture
def root(kit, tmp_path):
    for iteration in (10, 20, 12345678):
        kit.save(tmp_path, iteration)
    return tmp_path


def test_complete_checkpoints_are_listed_by_iteration(root):
    (root / "iter_0000015").mkdir()
    (root / "iter_0000010" / "__0_0.distcp").unlink()
    (root / "iter_0000030.partial-00ff00ff").mkdir()
    (root / "notes").mkdir()
    assert [path.name for path in list_checkpoints(root)] == ["iter_0000020", "iter_12345678"]
    assert list_checkpoints(root / "missing") == []


def test_the_latest_is_loaded_even_if_a_person_moved_it_back(root):
    assert find_checkpoint(str(root)).name == "iter_12345678"
    set_latest(root, 10)
    assert find_checkpoint(str(root)).name == "iter_0000010"
    (root / "latest_checkpointed_iteration.txt").write_text(" 20 \n")
    assert find_checkpoint(str(root)).name == "iter_0000020"


def test_by_folder_and_by_iteration(root):
    assert find_checkpoint(str(root / "iter_0000010")).name == "iter_0000010"
    assert find_checkpoint(str(root), 20).name == "iter_0000020"
    with pytest.raises(
        CheckpointError, match=r"iter_0000021 does not exist; complete checkpoints in .*: iter_0000010, iter_0000020"
    ):
        find_checkpoint(str(root), 21)
    with pytest.raises(CheckpointError, match="is the checkpoint of one iteration"):
        find_checkpoint(str(root / "iter_0000010"), 20)
    (root / "iter_0000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000010.manifest\.json: No such file"):
        find_checkpoint(str(root / "iter_0000010"))


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file, not a folder\. Give --load the --save folder"):
        find_checkpoint(str(tmp_path / "file"))


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path):
    assert find_checkpoint(str(tmp_path / "missing")) is None
    (tmp_path / "iter_0000001.partial-0a0b0c0d").mkdir()
    assert find_checkpoint(str(tmp_path)) is None


def test_a_missing_latest_file_is_reported(root):
    told = []
    (root / "latest_checkpointed_iteration.txt").unlink()
    assert find_checkpoint(str(root), notify=told.append).name == "iter_12345678"
    assert "is missing: loading the newest" in told[0]


def test_where_no_checkpoint_is_complete_none_is_offered(kit, tmp_path):
    (kit.save(tmp_path, 10).path / "__0_0.distcp").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"missing; complete .*: none\. Copy the folder again"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("lost", ["__0_0.distcp", "manifest.json", None])
def test_a_missing_latest_checkpoint_is_an_error_without_fallback(root, lost):
    set_latest(root, 20)
    if lost:
        (root / "iter_0000020" / lost).unlink()
    else:
        shutil.rmtree(root / "iter_0000020")
    with pytest.raises(CheckpointError, match=rf"iter_0000020.*{lost or 'not exist'}.*: iter_0000010, iter_123"):
        find_checkpoint(str(root))
    told = []
    assert find_checkpoint(str(root), fallback=True, notify=told.append).name == "iter_0000010"
    assert "loading iter_0000010 instead of the latest, iter_0000020" in told[0]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\x00\x00\x00", b"\xff\xfe1\x000\x00", b"1x", b"9" * 5000, "\u0661\u0660".encode()]
)
def test_a_damaged_latest_file_is_an_error_without_fallback(root, content):
    (root / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match="--fallback-on-corrupt"):
        find_checkpoint(str(root))
    assert unrecorded_iteration(root) is None
    assert "instead of an iteration" in latest_problem(root)
    told = []
    assert find_checkpoint(str(root), fallback=True, notify=told.append).name == "iter_12345678"
    assert "instead of the number of an iteration: loading the newest complete checkpoint, iter_12345678" in told[0]


def test_a_latest_file_with_a_byte_order_mark_is_read(root):
    (root / "latest_checkpointed_iteration.txt").write_bytes(b"\xef\xbb\xbf10\r\n")
    assert find_checkpoint(str(root)).name == "iter_0000010"


@pytest.mark.parametrize(("text", "says"), [("5", "iter_0000005 does not exist"), ("release", "'release'")])
def test_a_latest_file_that_names_no_checkpoint_is_an_error(root, text, says):
    (root / "latest_checkpointed_iteration.txt").write_text(text, encoding="utf-8")
    for fallback in (False, True):
        with pytest.raises(CheckpointError, match=says):
            find_checkpoint(str(root), fallback=fallback)


def test_saving_an_iteration_again_replaces_it(kit, root):
    (root / "iter_0000020" / "old").touch()
    kit.save(root, 20)
    assert not (root / "iter_0000020" / "old").exists()
    assert find_checkpoint(str(root)).name == "iter_0000020"
    assert not list(root.glob("*.replaced"))


def test_killed_between_the_two_renames_of_a_replacement(kit, root, monkeypatch):
    (root / "iter_0000020").rename(root / "iter_0000020.replaced")
    set_latest(root, 20)
    # Looking does not move anything: the saving process may be alive.
    assert find_checkpoint(str(root)) == root / "iter_0000020.replaced"
    assert find_checkpoint(str(root), 20) == root / "iter_0000020.replaced"
    assert [path.name for path in list_checkpoints(root)][1] == "iter_0000020.replaced"
    assert remove_stale(root) == []
    assert find_checkpoint(str(root)) == root / "iter_0000020"
    # … and just after the second: the new one stays, the old one goes at the next save.
    shutil.copytree(root / "iter_0000010", root / "iter_0000010.replaced")
    assert len(list_checkpoints(root)) == 3
    assert remove_stale(root) == ["iter_0000010.replaced"]
    assert is_complete(root / "iter_0000010")


def test_a_save_that_cannot_be_renamed_leaves_the_older_one(kit, root, monkeypatch):
    def refuse(partial, checkpoint):
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.replaced"))
        raise OSError(5, "Input/output error")

    before = (root / "iter_0000020" / "manifest.json").read_bytes()
    set_latest(root, 20)
    monkeypatch.setattr("megatron_lite.checkpoint.writing.make_visible", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        kit.save(root, 20)
    assert (find_checkpoint(str(root)) / "manifest.json").read_bytes() == before


def test_the_next_save_removes_the_remains_of_killed_saves(kit, root):
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


def test_a_partial_save_that_another_job_removes_cannot_become_a_checkpoint(root, monkeypatch):
    partial, remove, seen = root / "iter_0000009.partial-ab12", shutil.rmtree, []
    partial.mkdir()

    def watched(path, *words, **more):
        seen.append(path.name.split("-")[0])
        with pytest.raises(FileNotFoundError):
            make_visible(partial, root / "iter_0000009")
        remove(path, *words, **more)

    monkeypatch.setattr(shutil, "rmtree", watched)
    assert remove_stale(root) == ["iter_0000009.partial-ab12"]
    assert seen == ["iter_0000009.deleted"]


def test_folder_names_of_large_iterations():
    assert catalog.folder_name(100) == "iter_0000100"
    assert catalog.folder_name(123456789) == "iter_123456789"


def test_a_complete_save_newer_than_the_latest_file_is_unrecorded(kit, root):
    assert unrecorded_iteration(root) is None
    set_latest(root, 20)
    assert unrecorded_iteration(root) is None, "older than the file: left by a person or a rollback"
    text = root / "latest_checkpointed_iteration.txt"
    before = text.stat()
    kit.save(root, 30)
    text.write_text("20\n")
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert unrecorded_iteration(root) == 30
    (root / "iter_0000030" / ".metadata").unlink()
    assert unrecorded_iteration(root) is None
    text.unlink()
    assert unrecorded_iteration(root) is None
