"""metrics.jsonl sink: full-precision record of a run; format in runs/metrics_file.py."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import TrainingError
from megatron_lite.metrics.report import IterationReport, RunFacts, SaveRecord, ValidationReport
from megatron_lite.metrics.sink import Sink
from megatron_lite.runs.metrics_file import encode, prepare
from megatron_lite.system_errors import reason, remedy


class JsonlSink(Sink):
    """Appends one line per event, unbuffered: a kill loses at most the line being written.

    Args:
        path: the file; its folder is created.
        notify: called with the new path if the file of an earlier run was moved.
    """

    def __init__(self, path: Path, notify: Callable[[str], None] = lambda text: None) -> None:
        self._path = path
        self._notify = notify
        self._iteration = 0
        self._early: list[tuple[str, float]] = []  # messages before start()
        # Unbuffered: a signal handler may write in the middle of another write.
        self._file: FileIO | None = None

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Repair and truncate the file, then append the start record with the configuration."""
        self._iteration = facts.start_iteration
        with self._explained():
            moved = prepare(self._path, facts.start_iteration, validation_due=facts.validation_due)
            self._file = self._path.open("ab", buffering=0)
        if moved is not None:
            self._notify(f"the metrics of an earlier run were moved to {moved}")
        facts_of_run = dataclasses.asdict(facts)
        self._append(
            "start", {"iteration": facts.start_iteration, **facts_of_run, "config": dataclasses.asdict(config)}
        )
        for text, seconds in self._early:
            self._append("message", {"iteration": self._iteration, "text": text, "time": seconds})

    def iteration(self, report: IterationReport) -> None:
        """Append the iteration."""
        self._iteration = report.iteration
        self._append("iteration", _record(report))

    def validation(self, report: ValidationReport) -> None:
        """Append the evaluation."""
        self._append("validation", _record(report))

    def saved(self, record: SaveRecord) -> None:
        """Append the save."""
        self._append("save", dataclasses.asdict(record))

    def message(self, text: str) -> None:
        """Append the message with the number of finished iterations; one before start() follows the start record."""
        if self._file is None:
            self._early.append((text, time.time()))
        else:
            self._append("message", {"iteration": self._iteration, "text": text})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, kind: str, values: Mapping[str, Any]) -> None:
        assert self._file is not None, "start() comes first"
        with self._explained():
            line = encode({"kind": kind, "time": time.time(), **values})
            while line:  # a full disk accepts a part of the line before it raises an error
                line = line[self._file.write(line) :]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"Cannot write the metrics file {self._path}: {reason(error)}",
                fix=remedy(error, self._path, instead="give another path with --metrics-file", writing=True),
            ) from error


def _record(report: IterationReport | ValidationReport) -> dict[str, Any]:
    """Return the fields of the report that are not empty."""
    values = {entry.name: getattr(report, entry.name) for entry in dataclasses.fields(report)}
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None and value is not False and value != ""
    }
