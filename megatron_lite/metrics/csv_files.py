"""CSV sink: one file each of iterations, evaluations and saves, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.report import IterationReport, RunFacts, SaveRecord, ValidationReport
from megatron_lite.metrics.sink import Sink
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.metrics_file import move_aside

NAMES = ("iterations", "validations", "saves")
FIELDS = (
    "iteration",
    "consumed_train_samples",
    "consumed_train_tokens",
    "learning_rate",
    "global_batch_size",
    "seq_length",
    "loss_scale",
    "grad_norm",
    "num_zeros",
    "params_norm",
    "skipped",
    "nan",
    "seconds",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
)
"""Columns of iterations.csv, before one for each loss."""
VALIDATION_FIELDS = (
    "iteration",
    "split",
    "name",
    "at_end",
    "consumed_train_samples",
    "consumed_train_tokens",
    "seconds",
    "samples",
)


class CsvSink(Sink):
    """Appends a row to `iterations.csv`, `validations.csv` or `saves.csv` for each event.

    A resume removes the rows after its iteration, as in metrics.jsonl; a run that starts at 0 moves existing files
    aside. Rows are written at once, so that a reader sees them.

    Args:
        folder: of the files; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns: dict[str, list[str]] = {}
        self._files: dict[str, TextIO] = {}

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Truncate the files after the checkpoint's iteration."""
        for name in NAMES:
            path = self._path(name)
            if not path.exists():
                continue
            if facts.start_iteration == 0:
                move_aside(path)
                continue
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if _is_before(row, facts, name)]
                self._write(name, list(reader.fieldnames or ()), rows)

    def iteration(self, report: IterationReport) -> None:
        """Append the iteration."""
        self._append("iterations", {**{name: getattr(report, name) for name in FIELDS}, **report.losses})

    def validation(self, report: ValidationReport) -> None:
        """Append the evaluation."""
        self._append("validations", {**{name: getattr(report, name) for name in VALIDATION_FIELDS}, **report.losses})

    def saved(self, record: SaveRecord) -> None:
        """Append the save."""
        names = ("iteration", "seconds", "blocking_seconds", "size")
        self._append("saves", {name: getattr(record, name) for name in names})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.csv"

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        path, columns = self._path(name), self._columns.get(name, [])
        if new := [column for column in values if column not in columns]:
            # The first row of the file, or a loss that earlier rows do not have.
            rows: list[dict[str, Any]] = []
            if path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            self._write(name, [*columns, *new], rows)
        if name not in self._files:
            self._files[name] = path.open("a", newline="", encoding="utf-8", buffering=1)
        csv.DictWriter(self._files[name], self._columns[name]).writerow(dict(values))

    def _write(self, name: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
        """Replace a file; rows without their last cells, from a kill, are kept as they are."""
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        if (file := self._files.pop(name, None)) is not None:
            file.close()
        replace_file(self._path(name), text.getvalue().encode())
        self._columns[name] = columns


def _is_before(row: Mapping[str, Any], facts: RunFacts, name: str) -> bool:
    """Return whether a row is of an iteration that the resumed run does not repeat; a torn row is not."""
    if None in row.values() or not str(row.get("iteration")).isdecimal() or row.get("at_end") == "True":
        return False
    repeated = facts.validation_due and name == "validations"
    return int(row["iteration"]) <= facts.start_iteration - repeated
