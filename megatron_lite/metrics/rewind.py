"""Takes a run's reports back to an earlier iteration: cuts metrics.jsonl, and makes TensorBoard's files anew."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.config.metrics import MetricsConfig
from megatron_lite.metrics.jsonl import prepare, read_records
from megatron_lite.metrics.report import IterationReport, ValidationReport
from megatron_lite.metrics.tensorboard import TensorboardSink, open_writer

T = TypeVar("T")
_EVENTS = "events.out.tfevents.*"


def rewind(metrics: Path, iteration: int, aside: Path, tensorboard: str | None = None) -> list[str]:
    """Makes a run's reports end after `iteration`, at least 1.

    Args:
        metrics: the run's metrics.jsonl; nothing is done if there is none.
        iteration: the last one that stays.
        aside: a folder for the whole old file, and for TensorBoard's old files.
        tensorboard: the folder of TensorBoard's files; None: the one that the run was last given.

    Returns:
        What was done, in lines for people.

    Raises:
        DataError: metrics.jsonl is damaged.
        ConfigError: TensorBoard's files are to be made, and its package is missing.
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
        regenerate(records, Path(folder), aside / "tensorboard")
        done.append(f"made the TensorBoard files in {folder} anew")
    elif folder:
        done.append(f"the TensorBoard folder {folder} is not there")
    return done


def regenerate(records: list[dict[str, Any]], folder: Path, aside: Path) -> None:
    """Replaces TensorBoard's files in `folder` by ones made from records of metrics.jsonl; the old go to `aside`.

    Times, tags and steps are those that the run itself wrote.

    Raises:
        ConfigError: the package tensorboard is missing.
    """
    fresh = aside / "new"
    fresh.mkdir(parents=True)
    writer = _TimedWriter(open_writer(str(fresh), 1000))
    sink = TensorboardSink(MetricsConfig(), writer)
    for record in records:
        writer.time = float(record.get("time", 0.0))
        kind = record["kind"]
        if kind == "start":
            sink = TensorboardSink(_known(MetricsConfig, record["config"]["metrics"]), writer, record["world_size"])
            for part, values in record["config"].items():
                for name, value in values.items():
                    writer.add_text(f"{part}.{name}", str(value), record["iteration"])
        elif kind == "iteration":
            sink.iteration(_known(IterationReport, record))
        elif kind == "validation":
            sink.validation(_known(ValidationReport, record))
    sink.close()
    for path in folder.glob(_EVENTS):
        shutil.move(path, aside / path.name)
    for path in fresh.glob(_EVENTS):
        shutil.move(path, folder / path.name)
    fresh.rmdir()


class _TimedWriter:
    """A SummaryWriter whose points have the time that is set, instead of now."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.time = 0.0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step, walltime=self.time)

    def add_text(self, tag: str, text: str, global_step: int) -> None:
        self._writer.add_text(tag, text, global_step, walltime=self.time)

    def flush(self) -> None:
        """Everything is written at the end."""

    def close(self) -> None:
        self._writer.close()


def _known(kind: type[T], values: Mapping[str, Any]) -> T:
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def _tensorboard_of(records: list[dict[str, Any]]) -> str:
    starts = [record for record in records if record["kind"] == "start"]
    return str(starts[-1]["config"]["metrics"]["tensorboard_dir"]) if starts else ""
