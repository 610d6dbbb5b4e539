"""Rollback of a run to an earlier checkpoint: later ones are moved aside, samples can be excluded.

Safe against kills: after each step a run either resumes correctly from the folder or refuses it, because no run
overwrites checkpoints later than the latest. The same command again finishes an interrupted rollback.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.atomic import replace_file, sync_folder
from megatron_lite.runs.catalog import (
    LATEST_NAME,
    forget_best_after,
    incompleteness,
    iteration_of,
    list_checkpoints,
    locate,
    read_latest,
    set_latest,
)
from megatron_lite.runs.exit_status import (
    COMPLETED_NAME,
    EXIT_STATUS_NAME,
    ROLLED_BACK,
    ExitStatus,
    completed_iteration,
)
from megatron_lite.runs.manifest import MANIFEST_NAME, Manifest, encode_manifest, read_manifest
from megatron_lite.schedules.skipping import merged, place_of

WEIGHTS_FOLDER = "weights"
"""Below --save: the checkpoints of --weights-only-every."""
ROLLBACKS_NAME = "rollbacks.jsonl"


@dataclass(frozen=True)
class RollbackReport:
    """Result of a rollback.

    Attributes:
        checkpoint: the one that the next start loads.
        aside: the folder that later checkpoints were moved to; it exists even if there were none.
        moved: their names.
        skipped: all ranges [first, end) of positions in the data order that the run skips from now on.
    """

    checkpoint: Path
    aside: Path
    moved: tuple[str, ...]
    skipped: tuple[tuple[int, int], ...]


def roll_back(
    root: Path, iteration: int, skip: tuple[int, int] | None = None, *, automatic: bool = False
) -> RollbackReport:
    """Make an earlier checkpoint of a --save folder the latest. No run may be saving there.

    Args:
        root: the folder of --save.
        iteration: the checkpoint to return to.
        skip: positions [first, end) in the data order to skip from now on; later than the checkpoint.
        automatic: the run itself decided it; such rollbacks are counted (automatic_rollbacks).

    Raises:
        CheckpointError: there is no such checkpoint, it is incomplete, or it has trained on samples to be skipped.
        OSError: the folder cannot be changed.
    """
    checkpoint = locate(root, iteration)
    if problem := incompleteness(checkpoint):
        found = ", ".join(path.name for path in list_checkpoints(root)) or "none"
        raise CheckpointError(
            f"Cannot roll back to iteration {iteration}: {problem}; complete checkpoints in {root}: {found}",
            fix="Give --to the iteration of one of these checkpoints"
            if found != "none"
            else "Give --save a folder with complete checkpoints",
        )
    manifest = read_manifest(checkpoint)
    skipped = merged([*manifest.provenance.skipped_samples, *_checked(checkpoint, manifest, skip)])
    aside = _free(root)
    aside.mkdir()
    _record(root, iteration, skip, automatic, aside)
    if skipped != manifest.provenance.skipped_samples:
        provenance = replace(manifest.provenance, skipped_samples=skipped)
        replace_file(checkpoint / MANIFEST_NAME, encode_manifest(replace(manifest, provenance=provenance)))
    set_latest(root, iteration)
    forget_best_after(root, iteration)
    if not automatic:  # otherwise its job runs
        _replace_exit_status(root, iteration)
    moved = _move_later(root, iteration, aside)
    weights = root / WEIGHTS_FOLDER
    if weights.is_dir():
        _set_newest(weights, iteration)
        _move_later(weights, iteration, aside / WEIGHTS_FOLDER)
    return RollbackReport(checkpoint, aside, tuple(moved), skipped)


def automatic_rollbacks(root: Path) -> int:
    """Return the number of automatic rollbacks of the run that saves in `root`."""
    try:
        lines = (root / ROLLBACKS_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return sum(bool(json.loads(line)["automatic"]) for line in lines)


def _checked(checkpoint: Path, manifest: Manifest, skip: tuple[int, int] | None) -> list[tuple[int, int]]:
    if skip is None:
        return []
    first, end = skip
    consumed = manifest.scalars.get("progress", {}).get("consumed_train_samples", 0)
    reached = place_of(consumed, manifest.provenance.skipped_samples)
    # A range that an interrupted rollback has recorded may be requested again.
    known = any(a <= first and end <= b for a, b in manifest.provenance.skipped_samples)
    if not 0 <= first < end or (first < reached and not known):
        raise CheckpointError(
            f"Cannot skip the samples {first:,} to {end - 1:,}: {checkpoint.name} was saved at sample {reached:,}, "
            "after the first "
            "of them"
            if first < reached
            else f"Cannot skip the samples {first:,} to {end - 1:,}: the range is empty",
            fix=f"Roll back to an earlier checkpoint, or skip a range that begins at sample {reached} or later",
        )
    return [skip]


def _record(root: Path, iteration: int, skip: tuple[int, int] | None, automatic: bool, aside: Path) -> None:
    path = root / ROLLBACKS_NAME
    entry = {
        "time": round(time.time(), 3),
        "from": read_latest(root),
        "to": iteration,
        "skipped_samples": skip,
        "automatic": automatic,
        "moved_to": aside.name,
    }
    before = path.read_bytes() if path.exists() else b""
    replace_file(path, before + json.dumps(entry).encode() + b"\n")


def _replace_exit_status(root: Path, iteration: int) -> None:
    """Record that the run is at `iteration`, for scripts, chains and `watch`, which resubmit no complete run."""
    if (completed_iteration(root) or 0) > iteration:
        (root / COMPLETED_NAME).unlink()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    status = ExitStatus(
        status=ROLLED_BACK,
        message=f"rolled back to iteration {iteration} with `megatron-lite rollback`",
        iteration=iteration,
        saved_iteration=iteration,
        time=now,
        host=platform.node(),
    )
    replace_file(root / EXIT_STATUS_NAME, status.encode())


def _set_newest(weights: Path, iteration: int) -> None:
    """Make the newest checkpoint up to `iteration` the latest, if there is one."""
    left = [number for path in list_checkpoints(weights) if (number := iteration_of(path) or 0) <= iteration]
    if left:
        set_latest(weights, left[-1])
    else:
        (weights / LATEST_NAME).unlink(missing_ok=True)


def _move_later(root: Path, iteration: int, aside: Path) -> list[str]:
    later = sorted(entry for entry in root.iterdir() if (iteration_of(entry) or 0) > iteration)
    if later:
        aside.mkdir(exist_ok=True)
    for entry in later:
        entry.rename(aside / entry.name)
    sync_folder(root)
    return [entry.name for entry in later]


def _free(root: Path) -> Path:
    number = 1
    while (aside := root / f"rolled-back-{number}").exists():
        number += 1
    return aside
