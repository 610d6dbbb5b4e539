"""Truncation of a run's metrics.jsonl and TensorBoard event files to an earlier iteration."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.metrics_file import prepare, read_records

VS_SAMPLES = " vs samples"
VALIDATION = "loss validation"
"""Part of the tags of validation points."""
_HEAD, _FOOT = struct.Struct("<QI"), 4
"""TFRecord: length, checksum of the length, event, checksum of the event."""


def cut_events(folder: Path, iteration: int, aside: Path | None = None, *, validation_due: bool = False) -> bool:
    """Remove the points after an iteration from the event files in `folder`.

    TensorBoard's own purge_step compares the iteration with the steps of the `vs samples` tags as well, and would drop
    points of earlier iterations.

    Args:
        folder: TensorBoard folder.
        iteration: last iteration to keep.
        aside: folder for copies of the unmodified files; None: no copies.
        validation_due: remove the validation points of `iteration` as well, because the validation will be repeated.

    Returns:
        True if any point was removed.

    Raises:
        ConfigError: the package tensorboard is missing.
        OSError: a file cannot be read or replaced.
    """
    changed = False
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        kept = b"".join(_surviving(data, iteration, validation_due))
        if kept == data:
            continue
        changed = True
        if aside is not None:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, aside / path.name)
        replace_file(path, kept)
    return changed


def _surviving(data: bytes, iteration: int, validation_due: bool) -> Iterator[bytes]:
    left_out: dict[str, bool] = {}
    for record, event in _records(data):
        tags = [value.tag for value in event.summary.value]
        if len(tags) == 1 and tags[0].endswith(VS_SAMPLES):
            # The step is a number of samples: the decision follows the point by iteration, which was written before.
            late = left_out.get(tags[0].removesuffix(VS_SAMPLES), False)
        else:
            repeated = validation_due and any(VALIDATION in tag for tag in tags)
            late = event.step > iteration - repeated
            left_out.update(dict.fromkeys(tags, late))
        if not late:
            yield record


def _records(data: bytes) -> Iterator[tuple[bytes, Any]]:
    """Yield records with their events; an incomplete record at the end, left by a kill, is omitted."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as error:
        raise ConfigError(
            "Rolling back would truncate TensorBoard event files, but the package tensorboard is not installed",
            fix=install_extra("tensorboard"),
        ) from error

    start = 0
    while start + _HEAD.size <= len(data):
        length, _ = _HEAD.unpack_from(data, start)
        end = start + _HEAD.size + length + _FOOT
        if end > len(data):
            return
        yield data[start:end], Event.FromString(data[start + _HEAD.size : end - _FOOT])
        start = end


def rewind(metrics: Path, iteration: int, aside: Path, tensorboard: str | None = None) -> list[str]:
    """Truncate the metrics of a run after `iteration`, at least 1.

    Args:
        metrics: metrics.jsonl of the run; if it is missing, nothing is done.
        iteration: last iteration to keep.
        aside: folder for copies of the unmodified files.
        tensorboard: TensorBoard folder; None: the last --tensorboard-dir of the run.

    Returns:
        Lines that describe what was done.

    Raises:
        DataError: metrics.jsonl is damaged.
        ConfigError: event files must be truncated, and the package tensorboard is missing.
        OSError: a folder cannot be written to.
    """
    if not metrics.is_file():
        return [f"{metrics} does not exist: no metrics to truncate"]
    shutil.copy2(metrics, aside / metrics.name)
    prepare(metrics, iteration)
    done = [f"truncated {metrics} after iteration {iteration}"]
    records = read_records(metrics)
    folder = _tensorboard_of(records) if tensorboard is None else tensorboard
    if folder and Path(folder).is_dir():
        cut_events(Path(folder), iteration, aside / "tensorboard")
        done.append(f"truncated the TensorBoard files in {folder} after iteration {iteration}")
    elif folder:
        done.append(f"the TensorBoard folder {folder} does not exist")
    return done


def _tensorboard_of(records: list[dict[str, Any]]) -> str:
    starts = [record for record in records if record["kind"] == "start"]
    return str(starts[-1]["config"]["metrics"]["tensorboard_dir"]) if starts else ""
