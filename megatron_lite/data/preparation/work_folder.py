"""Resumable work folder of preprocessing ({output prefix}.partial/): finished shards of an incomplete run.

Units are finished when `{number of the first}.json` exists, which names their shards. Each attempt has its own shard
names: a worker process that outlives its killed parent cannot damage the shards of another attempt.

Shards that are copied and deleted moments later are not synced, which would write all tokens to the disk twice. A
killed process leaves them complete. After a failure of the machine the next run deletes those that end early, and makes
them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_lite.data.format.file_lock import acquire, holder
from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.report import UnitReport
from megatron_lite.data.preparation.sources import Source
from megatron_lite.errors import DataError, MegatronLiteError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.system_errors import reason, remedy

ASSEMBLED = "assembled."
"""Beginning of the names of the assembled datasets and their records, which sort behind those of single units."""

SHARD_SUFFIXES = (".bin", ".idx", ".order")
FORMAT = 3
"""Version of the files of a finished unit; part of the plan, so that a run never continues from another version."""


@dataclass(frozen=True)
class Shard:
    """Finished shard: path of its files without suffix, and size and CRC-32 of its .bin.

    A shard without a name is part of the datasets that `Assembly` writes.
    """

    name: str
    num_bytes: int
    checksum: int
    end: tuple[int, int, int] = (0, 0, 0)
    """Sequences, documents and tokens of the file up to the end of the unit."""


@dataclass(frozen=True)
class FinishedUnit:
    """Shards with a finished unit, one for each JSON key, and its report; size and checksum are those of the unit."""

    shards: list[Shard]
    report: UnitReport

    @property
    def is_assembled(self) -> bool:
        """Whether the unit is part of the assembled datasets."""
        return not any(shard.name for shard in self.shards)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> FinishedUnit:
        """Return the unit of a JSON object."""
        shards = [Shard(**{**shard, "end": tuple(shard.get("end", (0, 0, 0)))}) for shard in saved["shards"]]
        return cls(shards, UnitReport.from_dict(saved["report"]))


def plan_hash(options: PreprocessOptions, sources: Sequence[Source], tokenizer: dict[str, Any], unit_bytes: int) -> str:
    """Return a hash of everything that the bytes of the output and the division into units depend on."""
    content = {
        "format": FORMAT,
        "sources": [source.identity() for source in sources],
        "flags": options.identity() | {"unit_bytes": unit_bytes},
        "tokenizer": tokenizer,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def new_prefix(folder: Path, number: int) -> Path:
    """Return the path prefix of the shards of a new attempt at a unit."""
    return folder / f"{number:06d}-{os.getpid()}-{os.urandom(4).hex()}"


def mark_finished(folder: Path, units: dict[int, FinishedUnit], prefix: str = "", *, sync: bool = True) -> None:
    """Record that consecutive units are finished."""
    content = json.dumps({str(number): asdict(unit) for number, unit in units.items()}).encode()
    path = folder / f"{prefix}{min(units):06d}.json"
    if sync:
        replace_file(path, content)
    else:
        aside = path.with_name(f"{path.stem}-{os.getpid()}.tmp")
        aside.write_bytes(content)
        aside.replace(path)


def unwritable(folder: Path, error: OSError) -> DataError:
    """Return the error for a work folder that cannot be written to."""
    return DataError(
        f"Cannot write to {folder}: {reason(error)}",
        fix=f"{remedy(error, folder, writing=True)}; then give the same command again: it continues where it stopped",
    )


class WorkFolder:
    """Work folder of a run, locked by one process at a time.

    As a context manager, it deletes the folder at the end, and after an error unless the command can continue from it:
    then it has finished units, and `can_continue` is true.

    Args:
        output_prefix: the run's --output-prefix.
        plan: hash from plan_hash; unfinished work of another plan is deleted.
        shuffle: whether shards of finished units may be missing, because `drop` deleted them after the shuffle.

    Attributes:
        path: the folder.
        discarded: True if finished units of another plan were deleted.
        can_continue: False if the finished units cannot become a dataset.

    Raises:
        DataError: another run has locked the folder, or it cannot be created.
    """

    def __init__(self, output_prefix: str, plan: str, *, shuffle: bool = False) -> None:
        self.path = self.path_of(output_prefix)
        self.can_continue = True
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire()
            self.discarded = self._discard_other_plans(plan)
            self._remove_unfinished(shuffle)
        except OSError as error:
            raise DataError(
                f"Cannot write to {self.path}: {reason(error)}",
                fix=remedy(error, self.path, instead="give another --output-prefix", writing=True),
            ) from error

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_failure = isinstance(error, MegatronLiteError)
        if error is None or (is_failure and not (self.can_continue and self.finished())):
            self.remove()
        self.release()

    @staticmethod
    def path_of(output_prefix: str) -> Path:
        """Return the path of the work folder of an --output-prefix."""
        return Path(f"{output_prefix}.partial")

    @staticmethod
    def plan_of(output_prefix: str) -> str:
        """Return the plan of an incomplete run; empty if there is none."""
        path = WorkFolder.path_of(output_prefix) / "plan"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _acquire(self) -> TextIO:
        """Lock the folder until the process ends."""
        lock = (self.path / "lock").open("w")
        if not acquire(lock, wait=False):
            who, how = holder(lock)
            lock.close()
            raise DataError(
                f"{self.path} is in use by another preprocessing run: {who}",
                fix=f"Wait until that run ends, end it ({how}), or give another --output-prefix",
            )
        return lock

    def _discard_other_plans(self, plan: str) -> bool:
        """Empty the folder if it is of another plan; return True if finished units were deleted."""
        path = self.path / "plan"
        if path.is_file() and path.read_text(encoding="utf-8") == plan:
            return False
        old = [entry for entry in self.path.iterdir() if entry.name != "lock"]
        for entry in old:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        replace_file(path, plan.encode())
        return any(entry.suffix == ".json" for entry in old)

    def _remove_unfinished(self, shuffle: bool) -> None:
        for path in self.path.glob("*.json"):
            if not _is_intact(path, shuffle):
                path.unlink()
        keep = {shard.name for unit in self.finished().values() for shard in unit.shards}
        for entry in self.path.iterdir():
            is_shard = entry.suffix in SHARD_SUFFIXES and str(entry.with_suffix("")) not in keep
            if is_shard or (entry.suffix == ".tmp" and not entry.name.startswith(ASSEMBLED)):
                entry.unlink(missing_ok=True)

    def assembled(self, key: int) -> Path:
        """Return the path, without suffix, of the temporary files of the assembled dataset of a JSON key."""
        return self.path / f"{ASSEMBLED}{key}"

    def mark_assembled(self, units: dict[int, FinishedUnit]) -> None:
        """Record that units are part of the assembled datasets."""
        try:
            mark_finished(self.path, units, ASSEMBLED)
            for number in units:
                (self.path / f"{number:06d}.json").unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def finished(self) -> dict[int, FinishedUnit]:
        """Return the finished units by number."""
        found = dict[int, FinishedUnit]()
        for path in sorted(self.path.glob("*.json")):
            found |= _read_units(path)
        return dict(sorted(found.items()))

    def read(self, first: int) -> dict[int, FinishedUnit]:
        """Return the finished units from `first` on whose shards are files of their own; none if there are none."""
        path = self.path / f"{first:06d}.json"
        return _read_units(path) if path.exists() else {}

    def drop(self, shards: Sequence[Shard]) -> None:
        """Delete shards that are no longer needed; their units remain finished."""
        for shard in shards:
            for suffix in SHARD_SUFFIXES:
                Path(f"{shard.name}{suffix}").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder after the output is complete."""
        # The plan is deleted first: without it, the remains of an interrupted deletion are ignored.
        (self.path / "plan").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def release(self) -> None:
        """Release the lock."""
        self._lock.close()


def _is_intact(path: Path, may_be_missing: bool) -> bool:
    """Return whether a record and the shards that it names are complete."""
    try:
        names = {shard.name for unit in _read_units(path).values() for shard in unit.shards if shard.name}
        for name in names:
            if bin_path(name).exists() or not may_be_missing:
                IndexedDataset(name).check()
    except (ValueError, DataError):  # not JSON; missing or too short
        return False
    return True


def _read_units(path: Path) -> dict[int, FinishedUnit]:
    return {int(number): FinishedUnit.from_dict(unit) for number, unit in json.loads(path.read_bytes()).items()}
