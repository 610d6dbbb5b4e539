"""Resumable work folder of preprocessing ({output prefix}.partial/): finished shards of an incomplete run.

A unit is done when its `{number}.json` is there; that file names the shards, and a shard's name belongs to one
attempt, so a process that outlives its killed parent can spoil nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_lite.data.format.file_lock import acquire
from megatron_lite.data.format.manifest import write_json
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.report import Report
from megatron_lite.data.preparation.shard import Shard
from megatron_lite.data.preparation.sources import Source
from megatron_lite.errors import DataError
from megatron_lite.runs.atomic import replace_file

SHARD_SUFFIXES = (".bin", ".idx", ".order")
FORMAT = 2
"""Of what a finished unit leaves: counted up whenever it changes, so that no run continues from what it cannot read."""


@dataclass(frozen=True)
class Done:
    """A finished unit: its shards, one for each key, and what was seen."""

    shards: list[Shard]
    report: Report


def plan_hash(options: PreprocessOptions, sources: Sequence[Source], tokenizer: dict[str, Any], unit_bytes: int) -> str:
    """Hash of all that decides the output's bytes, and of how the work is cut into units of `unit_bytes`."""
    content = {
        "format": FORMAT,
        "sources": [asdict(source) for source in sources],
        "flags": options.identity() | {"unit_bytes": unit_bytes},
        "tokenizer": tokenizer,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def new_prefix(folder: Path, number: int) -> Path:
    """Where a new attempt at a unit puts its shards."""
    return folder / f"{number:06d}-{os.getpid()}-{os.urandom(4).hex()}"


def mark_done(folder: Path, number: int, done: Done) -> None:
    """Say that a unit is finished."""
    write_json(folder / f"{number:06d}.json", asdict(done))


class WorkFolder:
    """The folder, held by one run at a time.

    Args:
        output_prefix: the run's --output-prefix.
        plan: hash of what is to be made; what another plan left behind is thrown away.

    Raises:
        DataError: another run holds it, or it cannot be made.
    """

    def __init__(self, output_prefix: str, plan: str) -> None:
        self.path = self.path_of(output_prefix)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
            self.discarded = self._discard_other_plans(plan)
            self._remove_unfinished()
        except OSError as error:
            raise DataError(
                "The output's folder can be written to",
                found=f"{self.path}: {error.strerror or error}",
                fix="Give another --output-prefix, or free space",
            ) from error

    @staticmethod
    def path_of(output_prefix: str) -> Path:
        """Where the folder of a run lies."""
        return Path(f"{output_prefix}.partial")

    @staticmethod
    def plan_of(output_prefix: str) -> str:
        """The plan of a run that was begun and not completed; empty if there is none."""
        path = WorkFolder.path_of(output_prefix) / "plan"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _hold(self) -> TextIO:
        """Lock the folder; the lock goes with the process, however it ends."""
        lock = (self.path / "lock").open("w")
        if not acquire(lock, wait=False):
            lock.close()
            raise DataError(
                "One preprocessing run at a time writes to an --output-prefix",
                found=f"another run holds {self.path}",
                fix="Wait for it, or give another --output-prefix",
            )
        return lock

    def _discard_other_plans(self, plan: str) -> bool:
        """Empty the folder unless it is of this plan; says whether finished work was thrown away."""
        path = self.path / "plan"
        if path.is_file() and path.read_text(encoding="utf-8") == plan:
            return False
        old = [entry for entry in self.path.iterdir() if entry.name != "lock"]
        for entry in old:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        replace_file(path, plan.encode())
        return any(entry.suffix == ".json" for entry in old)

    def _remove_unfinished(self) -> None:
        keep = {shard.name for number in self.finished() for shard in self.read(number).shards}
        for entry in self.path.iterdir():
            is_shard = entry.suffix in SHARD_SUFFIXES and str(entry.with_suffix("")) not in keep
            if is_shard or entry.suffix == ".tmp":
                entry.unlink(missing_ok=True)

    def finished(self) -> list[int]:
        """Units that are done, in order."""
        return sorted(int(path.stem) for path in self.path.glob("*.json"))

    def read(self, number: int) -> Done:
        """What a finished unit left."""
        saved = json.loads((self.path / f"{number:06d}.json").read_bytes())
        return Done([Shard(**shard) for shard in saved["shards"]], Report.from_dict(saved["report"]))

    def drop(self, shards: Sequence[Shard]) -> None:
        """Free the disk of shards that others have taken the place of; that their units are done stays true."""
        for shard in shards:
            for suffix in SHARD_SUFFIXES:
                Path(f"{shard.name}{suffix}").unlink(missing_ok=True)

    def remove(self) -> None:
        """The output is complete. Without its plan, what an interrupted removal leaves of a folder counts no more."""
        (self.path / "plan").unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def release(self) -> None:
        """Leave the folder for the next run."""
        self._lock.close()
