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
"""Part of the tags of a validation's points."""
_HEAD, _FOOT = struct.Struct("<QI"), 4
"""A record: its length and that number's checksum, the event, and the event's checksum."""


def cut_events(folder: Path, iteration: int, aside: Path | None = None, *, validation_due: bool = False) -> bool:
    """Leaves out of the event files in `folder` what was written after an iteration.

    Args:
        folder: TensorBoard's.
        iteration: the last one that stays.
        aside: where files go, whole, before they are cut; None: nowhere.
        validation_due: whether the validation after that iteration is made again, so that its points go, too.

    Returns:
        Whether anything was left out.

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
            # Its step is a number of samples: it shares the fate of the point by iteration, which was written before.
            late = left_out.get(tags[0].removesuffix(VS_SAMPLES), False)
        else:
            repeated = validation_due and any(VALIDATION in tag for tag in tags)
            late = event.step > iteration - repeated
            left_out.update(dict.fromkeys(tags, late))
        if not late:
            yield record


def _records(data: bytes) -> Iterator[tuple[bytes, Any]]:
    """Records with their events; a torn one at the end, from a kill, is left out."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as error:
        raise ConfigError(
            "TensorBoard's files can only be cut with its package",
            found="tensorboard is not installed",
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
    """Makes a run's reports end after `iteration`, at least 1.

    Args:
        metrics: the run's metrics.jsonl; nothing is done if there is none.
        iteration: the last one that stays.
        aside: a folder for the whole old file, and for TensorBoard's.
        tensorboard: the folder of TensorBoard's files; None: the one that the run was last given.

    Returns:
        What was done, in lines for people.

    Raises:
        DataError: metrics.jsonl is damaged.
        ConfigError: TensorBoard's files are to be cut, and its package is missing.
        OSError: a folder cannot be written to.
    """
    if not metrics.is_file():
        return [f"{metrics} is not there: no metrics to cut"]
    shutil.copy2(metrics, aside / metrics.name)
    prepare(metrics, iteration)
    done = [f"cut {metrics} after iteration {iteration}"]
    records = read_records(metrics)
    folder = _tensorboard_of(records) if tensorboard is None else tensorboard
    if folder and Path(folder).is_dir():
        cut_events(Path(folder), iteration, aside / "tensorboard")
        done.append(f"cut the TensorBoard files in {folder} after iteration {iteration}")
    elif folder:
        done.append(f"the TensorBoard folder {folder} is not there")
    return done


def _tensorboard_of(records: list[dict[str, Any]]) -> str:
    starts = [record for record in records if record["kind"] == "start"]
    return str(starts[-1]["config"]["metrics"]["tensorboard_dir"]) if starts else ""
