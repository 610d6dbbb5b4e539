"""Selection of what `megatron-lite sync` copies: logs up to a consistent end, configuration, checkpoints."""

from __future__ import annotations

import io
import json
import os
import shlex
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_lite.config.arguments import to_argv
from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError, MegatronLiteError
from megatron_lite.ops.chain_script import SCRIPT_NAME
from megatron_lite.ops.chain_state import CHAIN_NAME, RESERVE_NAME
from megatron_lite.ops.exclude import EXCLUDE_NAME
from megatron_lite.ops.watch_alerts import ALERTS_NAME
from megatron_lite.ops.watch_metrics import METRICS_NAME, MetricsReader, metrics_path
from megatron_lite.runs.catalog import (
    LATEST_NAME,
    best_iteration,
    is_complete,
    latest_iteration,
    list_iterations,
    locate,
)
from megatron_lite.runs.manifest import MANIFEST_NAME, read_manifest
from megatron_lite.runs.rollback import WEIGHTS_FOLDER

LOG_FOLDERS = ("tensorboard", "logs", "wandb")
"""Folders of a run that are copied besides the one of --tensorboard-dir."""
LOCAL_NAMES = (ALERTS_NAME, CHAIN_NAME, SCRIPT_NAME, RESERVE_NAME, EXCLUDE_NAME, LATEST_NAME)
"""Files with the state of the run's own folder and jobs: a command given the copy must not act on these jobs.

`latest_checkpointed_iteration.txt` is generated, since the latest checkpoint of the copy may be another one.
"""
TEXT_SUFFIXES = (".jsonl", ".log", ".out", ".err", ".txt", "")
QUIET_SECONDS = 60.0
"""Time without a change after which an incomplete last line is copied: nobody is writing it any more."""


class SourceGone(Exception):
    """A file of a checkpoint was deleted or replaced while it was being copied."""


@dataclass(frozen=True)
class SyncFile:
    """A file to copy.

    Attributes:
        name: path at the destination, with slashes.
        source: the file, or the content of one that is generated.
        size: bytes to copy, as planned.
        stamp: time of the last change in nanoseconds, or the CRC-32 of a generated content.
        grows: the run may append to it: what is copied ends at a record or line.
    """

    name: str
    source: Path | bytes
    size: int
    stamp: int
    grows: bool = False

    def open(self) -> tuple[BinaryIO, int, int]:
        """Return the file opened for reading, the bytes to copy and the stamp, as they are now.

        Raises:
            SourceGone: it was deleted.
        """
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source), self.size, self.stamp
        try:
            file = self.source.open("rb")
        except FileNotFoundError as error:
            raise SourceGone(self.name) from error
        stat = os.fstat(file.fileno())
        size = consistent_size(file, self.source.name, stat) if self.grows else stat.st_size
        return file, size, stat.st_mtime_ns


@dataclass(frozen=True)
class Batch:
    """Files that appear at the destination together, as one checkpoint; or one by one, as logs.

    Attributes:
        title: for messages and as the commit's message.
        files: what it consists of.
        folder: name of the checkpoint's folder at the destination; empty: the files are no checkpoint.
        source: the checkpoint's folder.
        version: CRC-32 of its manifest.
    """

    title: str
    files: tuple[SyncFile, ...]
    folder: str = ""
    source: Path = Path()
    version: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def require_unchanged(self) -> None:
        """Verify that the checkpoint is the one that was selected.

        Raises:
            SourceGone: it was deleted, or replaced by another save of its iteration.
        """
        try:
            if zlib.crc32((self.source / MANIFEST_NAME).read_bytes()) == self.version:
                return
        except OSError:
            pass
        raise SourceGone(self.title)


def select_logs(run: Path, patterns: Sequence[str]) -> Batch:
    """Return metrics, logs, TensorBoard, configuration and command line of a run.

    Args:
        run: the --save folder.
        patterns: further log files outside of it, as Slurm's output; they are copied to `logs/`.

    Raises:
        ConfigError: a pattern matches no file.
    """
    reader = MetricsReader(metrics_path(run))
    reader.refresh()
    files = [_log(reader.path, METRICS_NAME)] if reader.path.is_file() else []
    files += [_log(path, path.name) for path in sorted(run.iterdir()) if _is_log(path)]
    folders = {run / name: name for name in LOG_FOLDERS}
    config = reader.start.get("config", {})
    if written := config.get("metrics", {}).get("tensorboard_dir", ""):
        folder = Path(written)
        inside = folder.is_relative_to(run) or folder.absolute().is_relative_to(run.absolute())
        if not inside:
            folders[folder] = "tensorboard"
        elif folder.absolute() != run.absolute():
            folders[folder] = folder.absolute().relative_to(run.absolute()).as_posix()
    for folder, name in folders.items():
        files += [_log(path, f"{name}/{path.relative_to(folder).as_posix()}") for path in _files_below(folder)]
    for pattern in patterns:
        found = [path for path in sorted(Path(pattern).parent.glob(Path(pattern).name)) if path.is_file()]
        if not found:
            raise ConfigError(
                f"--logs {pattern} matches no file",
                fix="Give a file, or a pattern of names in quotes: 'gpt-*.out'",
            )
        files += [_log(path, f"logs/{path.name}") for path in found]
    files += _configuration(config)
    return Batch("logs", tuple({file.name: file for file in files}.values()))


def select_checkpoints(run: Path, which: str, *, weights: bool = False) -> list[Batch]:
    """Return the complete checkpoints to copy, oldest first.

    Args:
        run: the --save folder.
        which: latest, best (--save-best), none, kept (all that are there), or iterations separated by commas.
        weights: also those of --weights-only-every.

    Raises:
        ConfigError: `which` is malformed.
        CheckpointError: an iteration that was named has no complete checkpoint.
    """
    latest = latest_iteration(run)
    if which == "none":
        wanted = []
    elif which == "latest":
        wanted = [] if latest is None else [latest]
    elif which == "best":
        wanted = [] if (best := best_iteration(run)) is None else [best]
    elif which == "kept":
        wanted = [iteration for iteration in list_iterations(run) if latest is None or iteration <= latest]
    else:
        wanted = _read_iterations(which)
    found = []
    for iteration in wanted:
        batch = _checkpoint(run, iteration, "")
        if batch is not None:
            found.append(batch)
        elif which not in ("latest", "best", "kept"):
            complete = [number for number in list_iterations(run) if is_complete(locate(run, number))]
            raise CheckpointError(
                f"--checkpoints {which}: {run} has no complete checkpoint of iteration {iteration:,}",
                fix=f"Give some of {', '.join(map(str, complete))}, the complete checkpoints of the folder"
                if complete
                else "The folder has no complete checkpoint: give --checkpoints none, or the --save folder of a run "
                "that has one",
            )
    if weights:
        below = run / WEIGHTS_FOLDER
        batches = (_checkpoint(below, iteration, f"{WEIGHTS_FOLDER}/") for iteration in list_iterations(below))
        found += [batch for batch in batches if batch is not None]
    return found


def consistent_size(file: BinaryIO, name: str, stat: os.stat_result) -> int:
    """Return how many bytes of a growing file end with a complete record (TensorBoard) or line (text).

    Args:
        file: opened for reading; it is left at its beginning.
        name: of the file, which shows its format.
        stat: of the opened file.
    """
    size = stat.st_size
    if "tfevents" in name:
        end = _event_end(file, size)
    elif Path(name).suffix in TEXT_SUFFIXES and (
        name.endswith(".jsonl") or time.time() - stat.st_mtime < QUIET_SECONDS
    ):
        end = _line_end(file, size)
    else:
        end = size
    file.seek(0)
    return end


def _event_end(file: BinaryIO, size: int) -> int:
    """Return the end of the last complete record: length (8 bytes), its CRC (4), data, their CRC (4)."""
    end = 0
    while end + 12 <= size:
        file.seek(end)
        (length,) = struct.unpack("<Q", file.read(8))
        if end + 16 + length > size:
            break
        end += 16 + length
    return end


def _line_end(file: BinaryIO, size: int, block: int = 65536) -> int:
    end = size
    while end > 0:
        begin = max(0, end - block)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _is_log(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name.endswith(".tmp") or name in LOCAL_NAMES or name.endswith((".bin", ".idx", ".npy")):
        return False
    return path.is_file()


def _files_below(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".tmp"))


def _log(path: Path, name: str) -> SyncFile:
    stat = path.stat()
    try:
        with path.open("rb") as file:
            return SyncFile(name, path, consistent_size(file, path.name, stat), stat.st_mtime_ns, grows=True)
    except OSError:  # it may be readable later; copying it says why it is not
        return SyncFile(name, path, stat.st_size, stat.st_mtime_ns, grows=True)


def _configuration(record: dict[str, object]) -> list[SyncFile]:
    """Return config.json and command_line.txt of the last start; none if there was none, or of another version."""
    if not record:
        return []
    made = {"config.json": json.dumps(record, indent=2) + "\n"}
    try:
        words = ["pretrain_gpt.py", *to_argv(from_record(RunConfig, record))]
        made["command_line.txt"] = shlex.join(words) + "\n"
    except (MegatronLiteError, AssertionError):
        pass
    contents = {name: text.encode() for name, text in made.items()}
    return [SyncFile(name, content, len(content), zlib.crc32(content)) for name, content in contents.items()]


def _checkpoint(root: Path, iteration: int, prefix: str) -> Batch | None:
    """Return a complete checkpoint; None: it is incomplete, or was deleted meanwhile."""
    path = locate(root, iteration)
    try:
        version = zlib.crc32((path / MANIFEST_NAME).read_bytes())
        if not is_complete(path):
            return None
        names = [*read_manifest(path).files, MANIFEST_NAME]
        stats = {name: (path / name).stat() for name in names}
    except (OSError, CheckpointError):
        return None
    folder = f"{prefix}iter_{iteration:07d}"
    files = [SyncFile(f"{folder}/{name}", path / name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    return Batch(folder, tuple(files), folder, path, version)


def _read_iterations(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(
            f"--checkpoints {text} is neither latest, none or kept nor a list of iterations",
            fix="Give for example --checkpoints latest or --checkpoints 1000,2000",
        )
    return sorted({int(word) for word in words})
