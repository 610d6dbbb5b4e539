"""Incremental reader of a run's metrics.jsonl, while the run appends to it or replaces it."""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from megatron_lite.errors import CheckpointError
from megatron_lite.runs.catalog import latest_iteration, locate
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.runs.metrics_file import decode, loss_point, spikes_of

METRICS_NAME = "metrics.jsonl"
CHUNK = 16 * 2**20
FULL_DETAIL = 2**20
"""Bytes at the end of a long file in which every iteration is read; before them a sample of about CHUNK bytes is."""
RECENT = 80
"""Iterations kept in full."""
MEASUREMENTS = 3
"""Measurements of the ranks' compute times that are kept: one slow iteration makes no straggler."""
MAX_POINTS = 40_000
_ITERATION = b'{"kind": "iteration"'


def metrics_path(run: Path) -> Path:
    """Return the metrics file of a run: in its folder, or at the --metrics-file that its latest checkpoint records."""
    path = run / METRICS_NAME
    try:
        if path.exists() or (iteration := latest_iteration(run)) is None:
            return path
        config = read_manifest(locate(run, iteration)).provenance.config
    except (CheckpointError, OSError):
        return path
    given = config.get("metrics", {}).get("metrics_file", "")
    return Path(given) if given else path


class MetricsReader:
    """What metrics.jsonl says so far; `refresh` reads the lines that were appended since.

    Args:
        path: the file, which need not exist yet.

    Attributes:
        start: the record of the last start; empty: there is none.
        recent: the last iteration records.
        curve: points (iteration, loss) by series; "" is the training loss.
        spikes: time and message match (SPIKE) of each loss spike, also in discarded iterations; one that a restart
            repeats counts once.
        rank_seconds: the last measurements, each with the compute seconds of every rank.
        messages: the last messages.
        last_time: time of the last record, in seconds since 1970; 0: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._forget()

    def refresh(self) -> None:
        """Read complete lines that are new; all of them if the file was replaced (by a resume or a rollback).

        A file that is missing, or cannot be read, counts as empty.
        """
        try:
            with self.path.open("rb") as file:
                self._read(file)
        except OSError:
            self._identity = None
            self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self.start: dict[str, Any] = {}
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self.curve: dict[str, list[tuple[float, float]]] = {}
        self.spikes: list[tuple[float, re.Match[str]]] = []
        self.rank_seconds: deque[list[float]] = deque(maxlen=MEASUREMENTS)
        self.messages: deque[str] = deque(maxlen=RECENT)
        self.last_time = 0.0

    def _read(self, file: BinaryIO) -> None:
        stat = os.fstat(file.fileno())
        if self._identity != (stat.st_dev, stat.st_ino) or stat.st_size < self._offset:
            self._identity = (stat.st_dev, stat.st_ino)
            self._forget()
        # Hundreds of megabytes after a long run, of which a screen shows a few hundred points.
        stride = 1 + max(0, stat.st_size - self._offset - FULL_DETAIL) // CHUNK
        detail_from = stat.st_size - FULL_DETAIL
        file.seek(self._offset)
        rest, number = b"", 0
        while chunk := file.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._offset += len(line) + 1
                number += 1
                if line.startswith(_ITERATION) and number % stride and self._offset < detail_from:
                    continue
                self._take(line)
        if len(self.curve.get("", ())) > MAX_POINTS:
            self.curve[""] = self.curve[""][::2]

    def _take(self, line: bytes) -> None:
        try:
            record = decode(line)
            kind = record["kind"]
            self.last_time = float(record.get("time", self.last_time))
            if (point := loss_point(record)) is not None:
                series, iteration, loss = point
                self.curve.setdefault(series, []).append((iteration, loss))
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # a damaged line; what is wrong with the file, `megatron-lite curve` says
        if kind == "start":
            self.start = record
            self.rank_seconds.clear()
        elif kind == "iteration":
            self.recent.append(record)
            if record.get("rank_seconds"):
                self.rank_seconds.append(record["rank_seconds"])
        elif kind == "message":
            text = str(record.get("text", ""))
            self.messages.append(text)
        if kind in ("message", "discarded"):
            known = {match.string for _, match in self.spikes}
            self.spikes += [spike for spike in spikes_of(record) if spike[1].string not in known]
