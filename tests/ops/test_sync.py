"""Tests of copying a run to a folder: what is copied, again and again, beside a run that saves and deletes."""

import json
import os
import shutil
import struct
import time
import zlib
from types import SimpleNamespace

import pytest

from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.ops import sync as sync_module
from megatron_lite.ops import sync_files, sync_folder
from megatron_lite.ops.sync import Selection, make_plan, sync
from megatron_lite.ops.sync_folder import FolderDestination
from megatron_lite.runs.catalog import is_complete, set_latest
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.manifest import Manifest, Provenance, SavedFile, SavedPart, encode_manifest
from megatron_lite.runs.process import this_process
from megatron_lite.runs.turnover import discard

PROCESS = this_process("here")


def save(run, iteration, *, content=b"weights", latest=True):
    """Save a checkpoint of two files."""
    folder = run / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    files = {}
    for name in ("rank0.distcp", "rank1.distcp"):
        data = content * 100 + name.encode()
        (folder / name).write_bytes(data)
        files[name] = SavedFile((SavedPart(0, len(data), zlib.crc32(data)),))
    manifest = Manifest(iteration, {}, files, {}, Provenance(), {"time": time.time()})
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    if latest:
        set_latest(run, iteration)
    return folder


@pytest.fixture
def run(tmp_path):
    made = tmp_path / "run"
    for iteration in (10, 20):
        save(made, iteration)
    (made / "metrics.jsonl").write_bytes(b'{"kind": "iteration", "iteration": 1}\n{"kind": "itera')
    (made / "exit_status.json").write_text("{}\n")
    (made / "job.lock").mkdir()
    (made / "iter_0000030.partial-ab").mkdir()
    (made / "iter_0000030.partial-ab" / "rank0.distcp").write_bytes(b"half")
    (made / "rolled-back-1" / "iter_0000015").mkdir(parents=True)
    for name in ("alerts.json", "chain.json", "chain.slurm", "chain.reserve", "excluded_nodes.txt"):
        (made / name).write_text("{}")
    (made / "chain.lock").mkdir()
    (made / "tensorboard").mkdir()
    event = struct.pack("<Q", 5) + b"1234" + b"abcde" + b"1234"
    (made / "tensorboard" / "events.out.tfevents.1").write_bytes(event * 3 + event[:15])
    return made


def copy(run, to, *, notes=None, **options):
    checksum = options.pop("checksum", False)
    notify = (lambda text: None) if notes is None else notes.append
    destination = FolderDestination(to, run, checksum=checksum)
    return sync(Selection(run=run, **options), destination, process=PROCESS, notify=notify)


def content(folder):
    """All files below a folder, without the record of the sync."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        name: path.read_bytes()
        for path in found
        if not (name := path.relative_to(folder).as_posix()).startswith(".sync/")
    }


def test_a_copy_holds_logs_up_to_a_whole_line_and_the_latest_checkpoint(run, tmp_path):
    to = tmp_path / "a" / "copy"
    summary = copy(run, to)
    assert set(content(to)) == {
        "metrics.jsonl",
        "exit_status.json",
        "tensorboard/events.out.tfevents.1",
        "iter_0000020/manifest.json",
        "iter_0000020/rank0.distcp",
        "iter_0000020/rank1.distcp",
        "latest_checkpointed_iteration.txt",
    }
    assert (to / "metrics.jsonl").read_bytes() == b'{"kind": "iteration", "iteration": 1}\n'
    assert (to / "tensorboard/events.out.tfevents.1").stat().st_size == 3 * 21
    assert (to / "latest_checkpointed_iteration.txt").read_text() == "20\n" and is_complete(to / "iter_0000020")
    assert summary.startswith(f"6 files copied to {to}") and summary.endswith("iteration 20")


def test_what_has_not_changed_is_not_copied_again(run, tmp_path, monkeypatch):
    to = tmp_path / "copy"
    copy(run, to)
    copied = []
    real = FolderDestination._copy
    monkeypatch.setattr(
        FolderDestination, "_copy", lambda self, file, *rest: copied.append(file.name) or real(self, file, *rest)
    )
    assert "0 files copied" in copy(run, to) and copied == []
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'tion"}\n')
    save(run, 40)
    copy(run, to)
    assert copied == [
        "metrics.jsonl",
        *(f"iter_0000040/{name}" for name in ("rank0.distcp", "rank1.distcp", "manifest.json")),
        "latest_checkpointed_iteration.txt",
    ]
    assert (to / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_checksums_find_a_change_that_size_and_time_hide(run, tmp_path):
    to = tmp_path / "copy"
    copy(run, to)
    stat = (to / "exit_status.json").stat()
    (to / "exit_status.json").write_text("[]\n")
    os.utime(to / "exit_status.json", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    copy(run, to)
    assert (to / "exit_status.json").read_text() == "[]\n"
    copy(run, to, checksum=True)
    assert (to / "exit_status.json").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("which", "expected"), [("none", []), ("latest", [20]), ("kept", [10, 20]), ("10", [10]), ("20,10,20", [10, 20])]
)
def test_chosen_checkpoints(run, tmp_path, which, expected):
    to = tmp_path / "copy"
    copy(run, to, checkpoints=which)
    assert sorted(path.name for path in to.glob("iter_*")) == [f"iter_{iteration:07d}" for iteration in expected]
    latest = to / "latest_checkpointed_iteration.txt"
    assert (latest.read_text() if expected else latest.exists()) == (f"{expected[-1]}\n" if expected else False)


def test_weights(run, tmp_path):
    save(run / "weights", 5)
    copy(run, tmp_path / "copy", weights=True)
    assert is_complete(tmp_path / "copy/weights/iter_0000005")


def test_deleting_is_limited_to_earlier_copies(run, tmp_path):
    to = tmp_path / "copy"
    copy(run, to, checkpoints="kept")
    (to / "notes.txt").write_text("mine")
    (run / "exit_status.json").unlink()
    discard(run / "iter_0000010")
    copy(run, to)
    assert (to / "iter_0000010").exists() and (to / "exit_status.json").exists()
    plan = make_plan(Selection(run=run, delete=True), FolderDestination(to, run))
    assert plan.deleted[0] == "exit_status.json" and len(plan.deleted) == 4 and plan.copies == []
    assert "4 deleted" in copy(run, to, delete=True)
    assert sorted(path.name for path in to.iterdir() if path.name.startswith(("iter", "exit", "notes"))) == [
        "iter_0000020",
        "notes.txt",
    ]
    assert (to / "latest_checkpointed_iteration.txt").exists()


def test_a_rolled_back_run(run, tmp_path):
    """The copy keeps later checkpoints, and names the newest that the run still counts."""
    to = tmp_path / "copy"
    copy(run, to, checkpoints="kept")
    (run / "iter_0000020").rename(run / "rolled-back-1" / "iter_0000020")
    set_latest(run, 10)
    changed = (run / "iter_0000010" / "manifest.json").read_bytes()
    (run / "iter_0000010" / "manifest.json").write_bytes(changed.replace(b'"time"', b'"TIME"'))
    with pytest.raises(CheckpointError):
        copy(run, to, checkpoints="10")  # its own checksum does not match
    body = changed.partition(b',\n"crc32"')[0].replace(b'"time"', b'"TIME"')
    (run / "iter_0000010" / "manifest.json").write_bytes(body + b',\n"crc32": "%08x"\n}\n' % zlib.crc32(body))
    copy(run, to)
    assert (to / "latest_checkpointed_iteration.txt").read_text() == "10\n"
    assert b"TIME" in (to / "iter_0000010" / "manifest.json").read_bytes() and is_complete(to / "iter_0000010")
    assert not list(to.glob("*.replaced")) and not list(to.glob("*.partial*"))


class Killed(BaseException):
    pass


def test_a_copy_that_was_killed_is_continued_and_never_seen_half(run, tmp_path, monkeypatch):
    to, copied = tmp_path / "copy", []
    real = FolderDestination._copy

    def dies(self, file, target, advance):
        if file.name.endswith("rank1.distcp"):
            target.with_name(f".{target.name}{sync_folder.ASIDE}").write_bytes(b"half")
            raise Killed
        return real(self, file, target, advance)

    monkeypatch.setattr(FolderDestination, "_copy", dies)
    with pytest.raises(Killed):
        copy(run, to)
    assert (to / "metrics.jsonl").exists() and not (to / "iter_0000020").exists()
    assert not (to / "latest_checkpointed_iteration.txt").exists()
    monkeypatch.setattr(
        FolderDestination, "_copy", lambda self, file, *rest: copied.append(file.name) or real(self, file, *rest)
    )
    copy(run, to)
    assert [name for name in copied if name.startswith("iter")] == [
        "iter_0000020/rank1.distcp",
        "iter_0000020/manifest.json",
    ]
    assert is_complete(to / "iter_0000020") and not [name for name in content(to) if "sync-tmp" in name]


@pytest.mark.parametrize("last", ["metrics.jsonl", "exit_status.json"])
def test_a_first_sync_that_was_killed_during_the_logs_is_continued(run, tmp_path, monkeypatch, last):
    to = tmp_path / "copy"
    real = FolderDestination._copy

    def dies(self, file, target, advance):
        made = real(self, file, target, advance)
        if file.name == last:
            with pytest.raises(ConfigError, match=r"Another sync to .* runs"):
                copy(run, to)
            raise Killed
        return made

    monkeypatch.setattr(FolderDestination, "_copy", dies)
    with pytest.raises(Killed):
        copy(run, to)
    monkeypatch.undo()
    other = tmp_path / "other"
    save(other, 5)
    with pytest.raises(ConfigError, match="holds the copy of another run"):
        copy(other, to)
    copy(run, to)
    assert is_complete(to / "iter_0000020")
    (run / last).unlink()
    copy(run, to, delete=True)
    assert not (to / last).exists(), "what the killed sync copied counts as copied"


def test_a_checkpoint_that_appeared_just_before_the_kill_is_named(run, tmp_path, monkeypatch):
    to = tmp_path / "copy"
    real = sync_folder.make_visible

    def dies(partial, final):
        real(partial, final)
        raise Killed

    monkeypatch.setattr(sync_folder, "make_visible", dies)
    with pytest.raises(Killed):
        copy(run, to)
    monkeypatch.undo()
    assert copy(run, to).endswith("latest checkpoint there: iteration 20")


def test_another_run_takes_the_folder_between_plan_and_lock(run, tmp_path, monkeypatch):
    to, other = tmp_path / "copy", tmp_path / "other"
    save(other, 5)
    real = sync_module.make_plan

    def late(selection, destination):
        plan = real(selection, destination)
        monkeypatch.undo()
        copy(other, to)
        return plan

    monkeypatch.setattr(sync_module, "make_plan", late)
    with pytest.raises(ConfigError, match="holds the copy of another run"):
        copy(run, to)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_replaced_by_the_next(run, tmp_path, monkeypatch, when):
    to, notes, deleted = tmp_path / "copy", [], []
    real = FolderDestination._copy

    def copies(self, file, target, advance):
        if not deleted and file.name.endswith("rank0.distcp" if when == "before" else "manifest.json"):
            deleted.append(True)
            save(run, 30)
            discard(run / "iter_0000020")
        return real(self, file, target, advance)

    monkeypatch.setattr(FolderDestination, "_copy", copies)
    copy(run, to, notes=notes)
    assert [path.name for path in to.glob("iter_*")] == ["iter_0000030"]
    assert notes == ["iter_0000020: the run deleted or replaced files while they were being copied"]
    assert (to / "latest_checkpointed_iteration.txt").read_text() == "30\n"


def test_a_checkpoint_that_is_saved_again_meanwhile_is_not_mixed(run, tmp_path, monkeypatch):
    to, again = tmp_path / "copy", []
    real = FolderDestination._copy

    def copies(self, file, target, advance):
        if not again and file.name.endswith("rank1.distcp"):
            again.append(True)
            shutil.rmtree(run / "iter_0000020")
            save(run, 20, content=b"others!")
        return real(self, file, target, advance)

    monkeypatch.setattr(FolderDestination, "_copy", copies)
    copy(run, to)
    for name in ("rank0.distcp", "rank1.distcp"):
        assert (to / "iter_0000020" / name).read_bytes().startswith(b"others!")


def test_another_save_of_the_iteration_replaces_the_copy(run, tmp_path):
    to = tmp_path / "copy"
    copy(run, to)
    shutil.rmtree(run / "iter_0000020")
    save(run, 20, content=b"others!")
    copy(run, to)
    assert (to / "iter_0000020/rank0.distcp").read_bytes().startswith(b"others!")
    assert [path.name for path in to.glob("iter_*")] == ["iter_0000020"]


def test_a_full_destination(run, tmp_path, monkeypatch):
    to = tmp_path / "copy"
    monkeypatch.setattr(sync_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"is full: iter_0000020 needs .* more, 10 B are free"):
        copy(run, to)
    assert (to / "metrics.jsonl").exists(), "the logs have arrived"

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(sync_folder.os, "utime", full)
    with pytest.raises(CheckpointError, match=r"is full: the copy of logs is incomplete.*continues"):
        copy(run, tmp_path / "other")
    assert "sync-tmp" not in str(content(tmp_path / "other"))


def test_two_syncs_to_one_destination(run, tmp_path):
    to = tmp_path / "copy"
    with (
        FolderLock(to / ".sync", process=PROCESS, command="sync", name="sync.lock"),
        pytest.raises(ConfigError, match=r"Another sync to .* runs: .*process"),
    ):
        copy(run, to)


def test_destinations_that_are_refused(run, tmp_path, monkeypatch):
    for to in (run, run / "copy", tmp_path):
        with pytest.raises(ConfigError, match=r"--to .* (is|is inside|contains) the run"):
            copy(run, to)
    other = tmp_path / "other"
    save(other, 5)
    with pytest.raises(
        ConfigError, match="holds files of a run that do not come from a sync, for example iter_0000005"
    ):
        copy(run, other)
    copy(run, tmp_path / "copy")
    with pytest.raises(ConfigError, match="holds the copy of another run"):
        copy(other, tmp_path / "copy")
    with (
        FolderLock(tmp_path / "copy", process=PROCESS, command="train"),
        pytest.raises(ConfigError, match="is in use by process"),
    ):
        copy(run, tmp_path / "copy")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        copy(run, tmp_path / "file")
    with pytest.raises(CheckpointError, match="Cannot write to"):
        copy(run, sync_files.Path("/proc/copy"))


def test_mistakes_about_the_run(run, tmp_path):
    to = tmp_path / "copy"
    (tmp_path / "empty").mkdir()
    for source, options, message in (
        (tmp_path / "none", {}, "does not exist"),
        (tmp_path / "empty", {}, "holds neither metrics, logs nor checkpoints"),
        (run, {"checkpoints": "newest"}, "neither latest, none or kept nor a list"),
        (run, {"checkpoints": "10,15"}, "no complete checkpoint of iteration 15"),
        (run, {"logs": (f"{tmp_path}/*.out",)}, "matches no file"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            copy(source, to, **options)
    assert not to.exists()


def test_further_logs_and_the_configuration(run, tmp_path):
    (tmp_path / "gpt-1.out").write_text("one\ntorn")
    config = {"metrics": {"tensorboard_dir": str(tmp_path / "tb")}}
    start = {"kind": "start", "time": 1.0, "iteration": 0, "config": config}
    (run / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "tb" / "x").mkdir(parents=True)
    (tmp_path / "tb" / "x" / "events.out.tfevents.2").write_bytes(b"")
    to = tmp_path / "copy"
    copy(run, to, logs=(f"{tmp_path}/gpt-*.out",), checkpoints="none")
    assert (to / "logs/gpt-1.out").read_text() == "one\n" and "config.json" in content(to)
    assert "tensorboard/x/events.out.tfevents.2" in content(to)
    old = time.time() - 1000
    os.utime(tmp_path / "gpt-1.out", (old, old))
    copy(run, to, logs=(f"{tmp_path}/gpt-*.out",), checkpoints="none")
    assert (to / "logs/gpt-1.out").read_text() == "one\ntorn", "nobody writes the rest of the line any more"
