"""Truncation of TensorBoard event files (TFRecords) after an iteration.

TensorBoard's own way, a purge_step at the head of the next file, would compare the iteration with the steps of the
`vs samples` tags as well, and drop those of iterations that stay.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lite.errors import ConfigError, install_extra
from megatron_lite.runs.atomic import replace_file

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
