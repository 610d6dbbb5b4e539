"""Folder as the destination of `megatron-lite sync`: files appear by a rename, checkpoints as a whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.formatting import format_size
from megatron_lite.ops.sync import STATE_FOLDER, Advance
from megatron_lite.ops.sync_files import Batch, SourceGone, SyncFile
from megatron_lite.runs.atomic import sync_folder
from megatron_lite.runs.catalog import iteration_of
from megatron_lite.runs.lock_file import read_owner
from megatron_lite.runs.process import is_running
from megatron_lite.runs.turnover import discard, make_visible

ASIDE = ".sync-tmp"
"""Suffix of a file that is being copied."""
CHUNK = 8 * 2**20


class FolderDestination:
    """A folder that holds the copy of one run.

    Args:
        folder: created if it does not exist.
        run: the --save folder, which must not overlap with it.
        checksum: compare contents instead of size and time of the last change.
    """

    def __init__(self, folder: Path, run: Path, *, checksum: bool = False) -> None:
        self.folder = folder
        self.name = str(folder)
        self.state = folder / STATE_FOLDER
        self._run = run
        self._checksum = checksum

    def check(self, known: bool) -> None:
        """Refuse a folder inside the run, around it, or with files of a run that no sync has copied."""
        ours, theirs = self.folder.resolve(), self._run.resolve()
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            how = "is" if ours == theirs else "is inside" if ours.is_relative_to(theirs) else "contains"
            raise ConfigError(
                f"--to {self.folder} {how} the run {self._run}",
                fix=f"Give a folder that is neither in the run nor above it, for example {theirs}-copy",
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--to {self.folder} is a file", fix="Give a folder")
        if not self.folder.is_dir():
            return
        owner = read_owner(self.folder)
        if owner is not None and is_running(owner.process) is not False:
            raise ConfigError(
                f"--to {self.folder} is in use by {owner.process} ({owner.command})",
                fix="Give --to another folder: a sync would overwrite the files that this process writes",
            )
        of_a_run = (path for path in self.folder.iterdir() if path.name == "metrics.jsonl" or iteration_of(path))
        if not known and (found := next(of_a_run, None)) is not None:
            raise ConfigError(
                f"--to {self.folder} holds files of a run that do not come from a sync, for example {found.name}",
                rule="A sync would replace files of the same name",
                fix="Give a new folder, or one of an earlier sync",
            )

    def is_current(self, file: SyncFile, recorded: Sequence[int] | None) -> bool:
        """Return whether the copy has size and time of the file (or its content)."""
        path = self.folder / file.name
        try:
            stat = path.stat()
        except OSError:
            return False
        if isinstance(file.source, bytes):
            return path.read_bytes() == file.source
        if stat.st_size != file.size:
            return False
        return _equal(path, file) if self._checksum else stat.st_mtime_ns == file.stamp

    def put(self, batch: Batch, files: Sequence[SyncFile], advance: Advance) -> dict[str, list[int]]:
        """Copy files of a batch; those of a checkpoint into a folder that gets its name when it is complete."""
        try:
            if batch.folder:
                return self._put_checkpoint(batch, advance, {file.name for file in files})
            return {file.name: self._copy(file, self.folder / file.name, advance) for file in files}
        except OSError as error:
            raise self._failed(error, batch) from error

    def delete(self, names: Sequence[str]) -> None:
        """Delete copies; a checkpoint is renamed first, so that no half of it is ever seen."""
        try:
            for name in names:
                path = self.folder / name
                if iteration_of(path.parent) is not None:
                    if path.parent.is_dir():
                        discard(path.parent)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"Cannot delete {error.filename}: {error.strerror}", fix="Change the permissions, or leave --delete out"
            ) from error

    def finish(self) -> None:
        """Remove what killed syncs have left: partial copies of checkpoints that the run has deleted since, for one."""
        for partial in (*self.folder.glob("iter_*.partial-*"), *self.folder.glob("*/iter_*.partial-*")):
            shutil.rmtree(partial, ignore_errors=True)
        for aside in self.folder.rglob(f".*{ASIDE}"):
            aside.unlink(missing_ok=True)

    def _put_checkpoint(self, batch: Batch, advance: Advance, new: set[str]) -> dict[str, list[int]]:
        final = self.folder / batch.folder
        # The name holds the version: a later sync continues this copy, and no other save of the iteration.
        partial = final.with_name(f"{final.name}.partial-{batch.version:08x}")
        partial.mkdir(parents=True, exist_ok=True)
        self._require_room(batch, partial)
        made = {}
        try:
            for file in batch.files:
                target = partial / Path(file.name).name
                if _is_copied(target, file):
                    made[file.name] = [file.size, file.stamp]
                    advance(file.size if file.name in new else 0)
                elif file.name not in new and _is_copied(final / target.name, file):
                    # Of a save that was replaced by one with another manifest, as a rollback writes.
                    shutil.copy2(final / target.name, target)
                    made[file.name] = [file.size, file.stamp]
                else:
                    made[file.name] = self._copy(file, target, advance)
            batch.require_unchanged()
        except SourceGone:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        make_visible(partial, final)
        return made

    def _copy(self, file: SyncFile, target: Path, advance: Advance) -> list[int]:
        """Copy one file aside and rename it; return size and stamp of the copy."""
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}{ASIDE}")
        source, size, stamp = file.open()
        try:
            with source, aside.open("wb") as copy:
                left = size
                while left and (chunk := source.read(min(CHUNK, left))):
                    copy.write(chunk)
                    left -= len(chunk)
                    advance(len(chunk))
                if left:  # it was truncated in place
                    raise SourceGone(file.name)
                copy.flush()
                os.fsync(copy.fileno())
            if isinstance(file.source, Path):
                os.utime(aside, ns=(stamp, stamp))
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(target.parent)
        return [size, stamp]

    def _require_room(self, batch: Batch, partial: Path) -> None:
        missing = sum(file.size for file in batch.files if not _is_copied(partial / Path(file.name).name, file))
        free = shutil.disk_usage(partial).free
        if missing > free:
            raise CheckpointError(
                f"{self.folder} is full: {batch.title} needs {format_size(missing)} more, {format_size(free)} are free",
                fix="Free space there, copy logs only (--checkpoints none), or give --delete, which deletes from the "
                "copy what --checkpoints does not select any more (--dry-run lists it)",
            )

    def _failed(self, error: OSError, batch: Batch) -> CheckpointError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CheckpointError(
                f"{self.folder} is full: the copy of {batch.title} is incomplete",
                fix="Free space and run the same command again: it continues with the files that are missing",
            )
        return CheckpointError(
            f"Cannot copy {batch.title} to {self.folder}: {error.filename or ''}: {error.strerror}",
            fix="Check the permissions of both folders, and run the same command again",
        )


def _is_copied(path: Path, file: SyncFile) -> bool:
    try:
        stat = path.stat()
    except OSError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (file.size, file.stamp)


def _equal(path: Path, file: SyncFile) -> bool:
    source, size, _ = file.open()
    with source, path.open("rb") as copy:
        left = size
        while left:
            one, other = source.read(min(CHUNK, left)), copy.read(min(CHUNK, left))
            if one != other or not one:
                return False
            left -= len(one)
    return True
