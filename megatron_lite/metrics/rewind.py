"""Truncates metrics.jsonl and TensorBoard files to an earlier iteration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_lite.metrics.event_files import cut_events
from megatron_lite.runs.metrics_file import prepare, read_records


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
