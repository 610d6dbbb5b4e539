"""metrics.jsonl file format: encoding, reading, and truncation on resume.

Each line is a JSON object whose `kind` is "start", "iteration", "validation", "save", "message" or "discarded" (the sum
of the lines that a resume or rollback removed, with the loss spikes among them). Floats are written with all their
digits, so that a file shows whether two runs are equal bit for bit. JSON has no NaN or infinities; they are the strings
"NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import DataError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.system_errors import reason, remedy

AVERAGE = "average"
"""Name of the average over several validation sets in reports."""
SPIKE = re.compile(r"WARNING: loss spike: the loss rose to (\S+) in iterations (\d+) to (\d+)")
"""Message of lifecycle/spikes.py."""
Decoder = Callable[[bytes], dict[str, Any]]
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line, with newline."""
    return json.dumps(_encodable(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Return the record of one line.

    Raises:
        ValueError: the line is not a JSON object with a `kind`.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("not an object with a kind")
    return {name: _decoded(value) for name, value in record.items()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in the file's order, without a torn end (from a kill or a power cut).

    Raises:
        DataError: the file cannot be read, a line before its end is damaged, or it is not a metrics file.
    """
    return [record for _, record in scan_lines(path)]


def metrics_path(config: RunConfig) -> Path | None:
    """Return the path of metrics.jsonl; None without --metrics-file and --save."""
    if config.metrics.metrics_file:
        return Path(config.metrics.metrics_file)
    return Path(config.checkpoint.save) / "metrics.jsonl" if config.checkpoint.save else None


def slowest_save(path: Path, newest: int = 20) -> float:
    """Return the seconds of the slowest of the newest saves of a run; 0: the file has none, or cannot be read.

    Only the records of saves are decoded: the file of a long run has gigabytes.
    """
    seconds: deque[float] = deque(maxlen=newest)
    with suppress(OSError), path.open("rb") as file:
        for line in file:
            if b'"save"' in line[:40]:
                with suppress(ValueError, KeyError, TypeError):
                    seconds.append(float(decode(line)["seconds"]))
    return max(seconds, default=0.0)


def loss_point(record: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """Return series, iteration and loss of a record; None: it has no finite loss that belongs in a curve.

    The series is "" for the training loss, else the name of the validation dataset ("validation" for a single one).
    """
    loss = record.get("losses", {}).get("lm loss", math.nan)
    if not math.isfinite(loss):
        return None
    if record["kind"] == "iteration":
        return "", float(record["iteration"]), float(loss)
    if record["kind"] == "validation" and record.get("split", "validation") == "validation":
        return record.get("name", "validation"), float(record["iteration"]), float(loss)
    return None


def is_average(name: str) -> bool:
    """Return whether an evaluation's name is that of the average over several datasets."""
    return name.partition("-")[0] == AVERAGE


def seconds_of(record: Mapping[str, Any]) -> float:
    """Return the seconds of the job's time that a record accounts for; 0: none of its own, or unknown.

    An iteration, an evaluation, the pause of training for a save, the start of a job, or what was discarded. Averages
    over several validation sets repeat their seconds.
    """
    kind = record["kind"]
    if kind == "validation" and is_average(str(record.get("name", ""))):
        return 0.0
    field = {"save": "blocking_seconds", "start": "startup_seconds"}.get(kind, "seconds")
    return float(record.get(field, 0.0))


def spikes_of(record: Mapping[str, Any]) -> list[tuple[float, re.Match[str]]]:
    """Return time and message (SPIKE) of each loss spike that a record reports: a message, or what was discarded."""
    messages = record.get("spikes", ()) if record["kind"] == "discarded" else (record,)
    return [
        (float(message.get("time", 0.0)), match)
        for message in messages
        if (match := SPIKE.match(str(message.get("text", ""))))
    ]


def scan_lines(
    path: Path, decode_line: Decoder = decode, skipped: list[int] | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield complete lines without their newline, each with its record, reading the file step by step.

    Args:
        path: the file.
        decode_line: returns the record of a line, or raises ValueError.
        skipped: receives the numbers of damaged lines between others, which are left out; None: they are an error.

    Raises:
        DataError: as read_records.
    """
    torn: tuple[int, bytes] | None = None
    damaged, found = list[int](), False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip(b"\n")
                if not line:
                    continue
                try:
                    record = decode_line(line)
                except ValueError:
                    torn = torn or (number, line)
                    damaged.append(number)
                    continue
                if torn is not None and (skipped is None or not found):
                    raise _damaged(path, *torn)
                if skipped is not None:
                    skipped += damaged
                torn, damaged, found = None, [], True
                yield line, record
    except OSError as error:
        raise DataError(
            f"Cannot read the metrics file {path}: {reason(error)}",
            fix=remedy(
                error,
                path,
                instead="give the metrics.jsonl of a run: it is in the folder of --save, or where --metrics-file was",
            ),
        ) from error
    if torn is not None and not found:
        raise _damaged(path, *torn)


def _damaged(path: Path, number: int, line: bytes) -> DataError:
    return DataError(
        f"{path} is not a metrics file, or it is damaged: line {number} ({line[:40]!r}) is not a JSON object with the "
        "key "
        '"kind"',
        fix="Give the metrics.jsonl of a run; if it is one, delete that line",
    )


def prepare(path: Path, resumed_iteration: int, *, validation_due: bool = False) -> Path | None:
    """Truncate a metrics file after `resumed_iteration`, so that the resumed run's file reads as one run.

    Removes lines of later iterations, evaluations at the end of an earlier, shorter run, and a torn end; the rest is
    kept byte for byte, and the file is replaced atomically. The time that the removed lines account for is kept in a
    line of kind "discarded". A run that starts at 0 moves an existing file aside, because it may be another run's.

    Args:
        path: the file.
        resumed_iteration: the last iteration whose lines stay.
        validation_due: the validation after that iteration will be repeated, so that its lines are removed, too.

    Returns:
        The path to which an old file was moved; None: it was not.

    Raises:
        DataError: the file is not a metrics file; it is unchanged.
        OSError: it is a folder, or cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not path.exists() or path.stat().st_size == 0:
        return None
    if resumed_iteration == 0 and _holds_another_run(path):
        return move_aside(path)
    kept, removed = list[bytes](), list[dict[str, Any]]()
    for line, record in scan_lines(path):
        if _survives(record, resumed_iteration, validation_due):
            kept.append(line)
        else:
            removed.append(record)
    content = b"".join(line + b"\n" for line in kept) + _encode_discarded(removed, resumed_iteration)
    if content != path.read_bytes():
        replace_file(path, content)
    return None


def _holds_another_run(path: Path) -> bool:
    """Return whether anything was measured: starts that failed at once do not count."""
    return any(record["kind"] in ("iteration", "validation") for record in read_records(path))


def _survives(record: Mapping[str, Any], resumed_iteration: int, validation_due: bool) -> bool:
    last = resumed_iteration - (validation_due and record["kind"] == "validation")
    return int(record.get("iteration", 0)) <= last and not record.get("at_end", False)


def _encode_discarded(removed: Sequence[Mapping[str, Any]], resumed_iteration: int) -> bytes:
    """Return the line that sums up removed records; empty: they account for no time.

    `time` is that of the last removed record, `starts` the number of removed starts of jobs, `spikes` the messages of
    loss spikes: the reason of a rollback.
    """
    seconds = sum(map(seconds_of, removed))
    earlier = [record for record in removed if record["kind"] == "discarded"]
    iterations = sum(record["kind"] == "iteration" for record in removed) + sum(
        int(one["iterations"]) for one in earlier
    )
    starts = sum(record["kind"] == "start" and not record.get("after_rollback", False) for record in removed)
    spikes = [{"time": when, "text": match.string} for record in removed for when, match in spikes_of(record)]
    if not iterations and not seconds:
        return b""
    last = max(float(record.get("time", 0.0)) for record in removed)
    values: dict[str, Any] = {"iterations": iterations, "seconds": seconds}
    values["starts"] = starts + sum(int(one["starts"]) for one in earlier)
    if spikes:
        values["spikes"] = spikes
    return encode({"kind": "discarded", "time": last, "iteration": resumed_iteration, **values})


def move_aside(path: Path) -> Path:
    """Rename a file to a free name `<stem>.previous-<number>`, and return it."""
    number = 1
    while (target := path.with_name(f"{path.stem}.previous-{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
    return target


def _encodable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(name): _encodable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(entry) for entry in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decoded(entry) for name, entry in value.items()}
    return value
