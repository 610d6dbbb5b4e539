"""Records of a run for its report: metrics.jsonl as columns of numbers, events, and the state of the job."""

from __future__ import annotations

import json
import math
import re
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lite.errors import DataError
from megatron_lite.formatting import format_ranges
from megatron_lite.ops.watch_metrics import MEASUREMENTS, METRICS_NAME, metrics_path
from megatron_lite.runs.comparison import Difference, compare_configs
from megatron_lite.runs.exit_status import ROLLED_BACK, ExitStatus, completed_iteration, read_exit_status
from megatron_lite.runs.lock_file import read_lock
from megatron_lite.runs.metrics_file import scan_lines, spikes_of
from megatron_lite.runs.rollback import ROLLBACKS_NAME

Column = NDArray[np.float64]
LOSS = "lm loss"
FIELDS = (
    "iteration",
    "consumed_train_samples",
    "consumed_train_tokens",
    "seconds",
    "learning_rate",
    "global_batch_size",
    "seq_length",
    "grad_norm",
    "loss_scale",
    "params_norm",
    "num_zeros",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
)
"""Fields of iteration records that are columns, besides the losses."""
# A million iterations have 600 MB, of which orjson (extra "fast") reads three times as many in a second.
_LOAD: Callable[[bytes], Any] = import_module("orjson").loads if find_spec("orjson") else json.loads
STATES = {
    "time_limit": "stopped at the time limit",
    "signal": "stopped by a signal",
    "kill_switch": "stopped by the kill switch",
    ROLLED_BACK: "rolled back",
    "error": "failed",
}
"""Texts of statuses of exit_status.json; `completed` and `evaluated` are texts themselves."""
_EXIT_FLAG = re.compile(r"--exit-[\w-]+")


@dataclass(frozen=True)
class Spike:
    """Recorded loss spike: iterations [first, last], the highest loss, the time of the warning.

    `discarded`: these iterations are not in the curves, because a restart or rollback discarded them.
    """

    first: int
    last: int
    loss: float
    time: float
    discarded: bool


@dataclass
class NotFinite:
    """Iterations [first, last] whose losses are not finite, the first of these losses, and the time of its record."""

    first: int
    last: int
    loss: float
    time: float


@dataclass(frozen=True)
class Event:
    """Start, evaluation, save or discarded record: kind, time, time of the latest record before it or 0, fields."""

    kind: str
    time: float
    before: float
    values: Mapping[str, Any]


@dataclass
class RunLog:
    """Everything recorded about a run.

    Attributes:
        name: of the run's folder.
        folder: the --save folder, or the one of the metrics file.
        path: metrics.jsonl.
        columns: values of FIELDS by iteration, NaN where unknown.
        losses: training losses by iteration: LOSS, and one for each data source of a blend, by the name of the source.
        starts: start records without their configurations.
        config: configuration of the last start.
        changes: differences between the configurations of each start and the one before; empty for the first.
        validations: evaluation records.
        parts: (iteration seconds, seconds by part) of each measured iteration.
        rank_seconds: busy seconds of each rank in the last measurements.
        spikes: recorded loss spikes, discarded iterations included; one that a restart repeats is listed once.
        rollbacks: records of rollbacks.jsonl.
        warnings: (iteration, text) of warnings.
        not_finite: iterations whose recorded training loss is NaN or infinite, in runs of consecutive ones.
        events: records other than iterations, in order.
        first_time: time of the first record minus the start-up of its job.
        last_time: time of the last record.
    """

    name: str
    folder: Path
    path: Path
    columns: dict[str, Column] = field(default_factory=dict)
    losses: dict[str, Column] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    changes: list[list[Difference]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    parts: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    rank_seconds: list[list[float]] = field(default_factory=list)
    spikes: list[Spike] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    not_finite: list[NotFinite] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    first_time: float = 0.0
    last_time: float = 0.0

    @property
    def start(self) -> dict[str, Any]:
        """Return the record of the last start; empty: there is none."""
        return self.starts[-1] if self.starts else {}

    @property
    def iterations(self) -> int:
        """Return the number of the last finished iteration."""
        reached = self.columns["iteration"]
        return int(reached[-1]) if len(reached) else int(self.start.get("iteration", 0))

    def last(self, name: str) -> float:
        """Return the last value of a column; NaN: there is none."""
        values = self.columns[name]
        return float(values[-1]) if len(values) else math.nan

    def median(self, name: str) -> float:
        """Return the median of a column's second half, after warm-up and ramp-up; NaN: no value is known."""
        values = self.columns[name]
        values = values[len(values) // 2 :]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else math.nan

    def validation_curves(self, split: str = "validation") -> dict[str, list[dict[str, Any]]]:
        """Return the evaluations of a split by dataset."""
        found: dict[str, list[dict[str, Any]]] = {}
        for record in self.validations:
            if record.get("split", "validation") == split:
                found.setdefault(str(record.get("name", split)), []).append(record)
        return found

    def exit_status(self) -> ExitStatus | None:
        """Return how the last job ended; None: unknown."""
        return read_exit_status(self.folder)

    def state(self) -> str:
        """Return the state of the run in a few words."""
        if completed_iteration(self.folder) is not None:
            return "completed"
        if (status := self.exit_status()) is not None:
            if status.status == "exit_flag" and (flag := _EXIT_FLAG.search(status.message)):
                return f"stopped by {flag[0]}"
            return STATES.get(status.status, status.status)
        lock = read_lock(self.folder)
        return "running" if lock is not None and lock.is_held(time.time()) else "unfinished"


def loss_of(record: Mapping[str, Any]) -> float:
    """Return the loss of an evaluation record; NaN: it has none."""
    return float(record.get("losses", {}).get(LOSS, math.nan))


def lowest(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the evaluation with the lowest finite loss; None: there is none."""
    return min((record for record in records if math.isfinite(loss_of(record))), key=loss_of, default=None)


def loss_text(loss: float) -> str:
    """Return a loss with four decimals, or NaN, Infinity or -Infinity as in metrics.jsonl."""
    return f"{loss:.4f}" if math.isfinite(loss) else "NaN" if math.isnan(loss) else f"{'-' * (loss < 0)}Infinity"


def read_run(given: Path) -> RunLog:
    """Read a run from its --save folder or its metrics.jsonl.

    Raises:
        DataError: the file is missing or damaged, or holds no iteration.
    """
    path = metrics_path(given) if given.is_dir() or not given.exists() else given
    folder = given if given.is_dir() else path.parent
    if not path.exists():
        raise DataError(
            f"{given} {'holds no ' + METRICS_NAME if given.is_dir() else 'does not exist'}",
            fix="Give the --save folder of a run, or its metrics.jsonl (--metrics-file)",
        )
    log = RunLog(folder.resolve().name, folder, path, rollbacks=_read_rollbacks(folder))
    _Reader(log).read()
    if not len(log.columns["iteration"]) and not log.validations:
        raise DataError(
            f"The metrics file {path} contains no iteration",
            fix="Wait until the run has finished an iteration, or give the folder of another run",
        )
    return log


def _read_rollbacks(folder: Path) -> list[dict[str, Any]]:
    """Return the records of rollbacks.jsonl that can be read, in order."""
    path = folder / ROLLBACKS_NAME
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"to", "time"} <= record.keys():
            found.append(record)
    return found


class _Reader:
    """Collects the records of a file of any length: iterations become arrays of doubles."""

    def __init__(self, log: RunLog) -> None:
        self._log = log
        self._columns = {name: array("d") for name in FIELDS}
        self._losses: dict[str, array[float]] = {LOSS: array("d")}
        self._config: dict[str, Any] = {}
        self._spikes: dict[tuple[int, int, str], Spike] = {}
        self._count = 0

    def read(self) -> None:
        log = self._log
        skipped: list[int] = []
        for _, record in scan_lines(log.path, _decode, skipped):
            kind = record["kind"]
            if kind == "iteration":
                self._iteration(record)
            else:
                self._other(kind, record)
            log.last_time = max(log.last_time, float(record.get("time", 0.0)))
        if skipped:
            lines = format_ranges(skipped)
            log.warnings.append((0, f"{log.path} is damaged in line {lines}, which this report leaves out"))
        log.columns = {name: np.array(values) for name, values in self._columns.items()}
        log.losses = {name.removeprefix(f"{LOSS} "): np.array(values) for name, values in self._losses.items()}
        log.config = self._config
        log.spikes = list(self._spikes.values())
        if not log.first_time:
            log.first_time = log.last_time - float(log.columns["seconds"].sum())

    def _iteration(self, record: Mapping[str, Any]) -> None:
        for name, values in self._columns.items():
            values.append(float(record.get(name, math.nan)))
        losses = record.get("losses", {})
        for name, loss in losses.items():
            if name not in self._losses:
                self._losses[name] = array("d", [math.nan]) * self._count
            self._losses[name].append(float(loss))
        self._count += 1
        if not math.isfinite(loss := float(losses.get(LOSS, 0.0))):
            self._not_finite(int(record["iteration"]), loss, float(record.get("time", 0.0)))
        if len(losses) != len(self._losses):
            for values in self._losses.values():
                if len(values) < self._count:
                    values.append(math.nan)
        if "parts" in record or "rank_seconds" in record:
            self._measured(record)

    def _not_finite(self, iteration: int, loss: float, when: float) -> None:
        found = self._log.not_finite
        if found and found[-1].last == iteration - 1:
            found[-1].last = iteration
        else:
            found.append(NotFinite(iteration, iteration, loss, when))

    def _measured(self, record: Mapping[str, Any]) -> None:
        log, seconds = self._log, self._columns["seconds"]
        # The parts are those of the iteration before.
        if "parts" in record and self._count > 1:
            log.parts.append((seconds[-2], record["parts"]))
        if record.get("rank_seconds"):
            log.rank_seconds = [*log.rank_seconds[1 - MEASUREMENTS :], record["rank_seconds"]]

    def _other(self, kind: str, record: dict[str, Any]) -> None:
        log, when = self._log, float(record.get("time", 0.0))
        if kind == "start":
            config = record.pop("config", {})
            found = compare_configs(self._config, config) if self._config else []
            log.changes.append([change for change in found if change.is_comparable])
            self._config = config
            log.starts.append(record)
            log.rank_seconds = []
            if not log.first_time:
                log.first_time = when - float(record.get("startup_seconds", 0.0))
        elif kind == "validation":
            log.validations.append(record)
        elif kind == "message":
            text = str(record.get("text", ""))
            if text.startswith("WARNING"):
                log.warnings.append((int(record.get("iteration", 0)), text.removeprefix("WARNING: ")))
        if kind in ("message", "discarded"):
            for time_of, match in spikes_of(record):
                first, last, loss = int(match[2]), int(match[3]), float(match[1].rstrip(","))
                # A restart repeats the spikes of the iterations that it discards.
                self._spikes[first, last, loss_text(loss)] = Spike(first, last, loss, time_of, kind == "discarded")
        if kind in ("start", "validation", "save", "discarded"):
            log.events.append(Event(kind, when, log.last_time, record))


def _decode(line: bytes) -> dict[str, Any]:
    """Return the record of a line, its numbers that are not finite still as strings, which float() reads."""
    record = _LOAD(line)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("not an object with a kind")
    return record
