"""Copying of a run to a folder or a hub repository: what is new since the last time, beside a running job."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.formatting import format_count, format_size
from megatron_lite.ops.sync_files import Batch, SourceGone, SyncFile, select_checkpoints, select_logs
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.catalog import LATEST_NAME, iteration_of, latest_iteration
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.process import ProcessId
from megatron_lite.system_errors import reason, remedy

RECORD_NAME = "record.json"
STATE_FOLDER = ".sync"
LOCK_NAME = "sync.lock"
ATTEMPTS = 3
"""Selections of checkpoints: one that the run deletes while it is copied is replaced by a newer one."""

Advance = Callable[[int], None]
"""Called with the number of bytes that were copied."""


class Destination(Protocol):
    """Where a run is copied to."""

    name: str
    """For messages."""
    state: Path
    """Folder of its lock and record."""

    def check(self, known: bool) -> None:
        """Raise a ConfigError if nothing may be copied there; `known`: an earlier sync has copied there."""

    def is_current(self, file: SyncFile, recorded: Sequence[int] | None) -> bool:
        """Return whether the destination has a file as it is now; `recorded`: size and stamp of the copy."""

    def put(self, batch: Batch, files: Sequence[SyncFile], advance: Advance) -> dict[str, list[int]]:
        """Copy some files of a batch, and return size and stamp of each copy by name.

        Raises:
            SourceGone: a file was deleted or replaced meanwhile; nothing of a checkpoint has appeared.
            CheckpointError: the destination is full, or cannot be reached.
        """

    def delete(self, names: Sequence[str]) -> None:
        """Delete copies."""

    def finish(self) -> None:
        """Clean up after everything was copied."""


@dataclass
class Plan:
    """What a sync does.

    Attributes:
        copies: the files to copy, by batch.
        unchanged: number of files that the destination has already.
        unrecorded: size and stamp of those that an interrupted sync copied without recording them, by name.
        deleted: copies to delete.
    """

    copies: list[tuple[Batch, list[SyncFile]]] = field(default_factory=list)
    unchanged: int = 0
    unrecorded: dict[str, list[int]] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes to copy."""
        return sum(file.size for _, files in self.copies for file in files)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a run is copied.

    Attributes:
        run: the --save folder.
        checkpoints: latest, none, kept, or iterations separated by commas.
        weights: also the checkpoints of --weights-only-every.
        logs: patterns of further log files.
        delete: delete copies of what the run does not have any more, or is not selected any more.
    """

    run: Path
    checkpoints: str = "latest"
    weights: bool = False
    logs: tuple[str, ...] = ()
    delete: bool = False


def make_plan(selection: Selection, destination: Destination) -> Plan:
    """Return what a sync would do now; nothing is written.

    Raises:
        ConfigError: the folder is no run, or a pattern or the list of checkpoints is wrong.
        CheckpointError: a checkpoint that was named is missing or incomplete.
    """
    if not selection.run.is_dir():
        raise ConfigError(
            f"{selection.run} {'is not a folder' if selection.run.exists() else 'does not exist'}",
            fix="Give the --save folder of a run",
        )
    record = _read_record(destination)
    _check_source(selection, destination, record)
    checkpoints = select_checkpoints(selection.run, selection.checkpoints, weights=selection.weights)
    # Checkpoints last: with a full destination, the logs have arrived at least.
    batches = [select_logs(selection.run, selection.logs), *checkpoints]
    if not any(batch.files for batch in batches):
        raise ConfigError(
            f"{selection.run} holds neither metrics, logs nor checkpoints", fix="Give the --save folder of a run"
        )
    plan, files = Plan(), record["files"]
    for batch in batches:
        new = []
        for file in batch.files:
            if not destination.is_current(file, files.get(file.name)):
                new.append(file)
            elif file.name not in files:
                plan.unrecorded[file.name] = [file.size, file.stamp]
        plan.unchanged += len(batch.files) - len(new)
        if new:
            plan.copies.append((batch, new))
    if selection.delete:
        kept = {file.name for batch in batches for file in batch.files} | {LATEST_NAME}
        plan.deleted = sorted({*files, *plan.unrecorded} - kept)
    return plan


def sync(
    selection: Selection,
    destination: Destination,
    *,
    process: ProcessId,
    notify: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Copy what is new, and return a summary. Interrupted at any point, the same call completes it.

    Args:
        selection: what to copy.
        destination: where to.
        process: this process, for the lock.
        notify: receives lines for the user.
        progress: receives the finished and the total number of bytes.

    Raises:
        ConfigError: as make_plan; or another sync to this destination runs.
        CheckpointError: as make_plan; or the destination is full, or cannot be reached.
    """
    plan = make_plan(selection, destination)
    with _locked(destination, process, notify):
        record, copied, size = _read_record(destination), 0, 0
        _check_source(selection, destination, record)  # another sync may have ended since the plan was made
        record["source"] = str(selection.run.resolve())
        # Before the first file: a destination with files but no record is refused, so an interrupted sync could not
        # be continued.
        _write_record(destination, record, notify)
        for attempt in range(ATTEMPTS):
            done, total = 0, plan.size
            record["files"].update(plan.unrecorded)

            def advance(count: int, total: int = total) -> None:
                nonlocal done
                done += count
                progress(min(done, total), total)

            gone = False
            for batch, files in plan.copies:
                try:
                    made = destination.put(batch, files, advance)
                except SourceGone:
                    gone = True
                    notify(f"{batch.title}: the run deleted or replaced files while they were being copied")
                    continue
                copied, size = copied + len(made), size + sum(entry[0] for entry in made.values())
                record["files"].update(made)
                _write_record(destination, record, notify)
            if not gone or attempt == ATTEMPTS - 1:
                break
            plan = make_plan(selection, destination)
        latest = _put_latest(selection, destination, record)
        if plan.deleted:
            destination.delete(plan.deleted)
            for name in plan.deleted:
                record["files"].pop(name, None)
        _write_record(destination, record, notify)
        destination.finish()
    parts = [f"{format_count(copied, 'file')} copied to {destination.name} ({format_size(size)})"]
    parts += [f"{plan.unchanged:,} unchanged"] if plan.unchanged else []
    parts += [f"{len(plan.deleted):,} deleted"] if plan.deleted else []
    parts += [f"latest checkpoint there: iteration {latest:,}"] if latest is not None else []
    return ", ".join(parts)


def _put_latest(selection: Selection, destination: Destination, record: dict[str, Any]) -> int | None:
    """Name the newest copied checkpoint that the run has not rolled back as the latest; None: there is none."""
    at_source = latest_iteration(selection.run)
    folders = {name.partition("/")[0] for name in record["files"] if name.endswith("/manifest.json")}
    found = [number for folder in folders if (number := iteration_of(Path(folder))) is not None]
    usable = [number for number in found if at_source is None or number <= at_source]
    if not usable:
        return None
    content = f"{max(usable)}\n".encode()
    file = SyncFile(LATEST_NAME, content, len(content), max(usable))
    if not destination.is_current(file, record["files"].get(LATEST_NAME)):
        batch = Batch(f"latest checkpoint: iteration {max(usable)}", (file,))
        record["files"].update(destination.put(batch, [file], lambda count: None))
    return max(usable)


@contextlib.contextmanager
def _locked(destination: Destination, process: ProcessId, notify: Callable[[str], None]) -> Iterator[None]:
    lock = FolderLock(destination.state, process=process, command="sync", notify=notify, name=LOCK_NAME)
    try:
        lock.acquire()
    except CheckpointError as error:
        raise ConfigError(f"Another sync to {destination.name} runs: {error.problem}", fix=error.fix) from error
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {error.filename or destination.state}: {reason(error)}; nothing was copied",
            fix=remedy(error, destination.state, instead="give another destination", writing=True),
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_source(selection: Selection, destination: Destination, record: dict[str, Any]) -> None:
    source, run = record["source"], str(selection.run.resolve())
    if source and source != run:
        raise ConfigError(
            f"{destination.name} holds the copy of another run, {source}",
            fix=f"Give another destination; if {run} is the same run, moved, remove {destination.state / RECORD_NAME}",
        )
    destination.check(known=bool(source))


def _read_record(destination: Destination) -> dict[str, Any]:
    """Return the record of earlier syncs: `source`, and `files` with size and stamp of each copy."""
    path = destination.state / RECORD_NAME
    try:
        content = json.loads(path.read_bytes())
        return {"source": str(content["source"]), "files": {str(k): list(v) for k, v in content["files"].items()}}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {"source": "", "files": {}}


def _write_record(destination: Destination, record: dict[str, Any], notify: Callable[[str], None]) -> None:
    try:
        replace_file(destination.state / RECORD_NAME, (json.dumps(record, indent=0) + "\n").encode())
    except OSError as error:
        notify(f"WARNING: cannot write {destination.state / RECORD_NAME} ({error.strerror}): files may be sent again")
