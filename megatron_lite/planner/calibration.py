"""Calibration: fits the efficiencies of a machine to the iterations of a measured run (metrics.jsonl).

The measured times are those of whole iterations, and with --timing-log-level 1 those of its parts. What they do not
determine stays as near as possible to a common factor of all kinds of work: one time gives that factor alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.step_time import StepTime, step_time_of
from megatron_lite.runs.metrics_file import scan_lines

WARM_UP = 3
"""First iterations of a job that are left out: allocation, compilation, reading ahead."""
GROUPS: dict[str, tuple[str, ...]] = {
    "matmul": ("matmul", "recompute"),
    "attention": ("attention",),
    "memory": ("elementwise",),
    "optimizer": ("optimizer",),
    "communication": ("tensor_parallel", "context_parallel", "pipeline", "data_parallel"),
}
"""Parts of a step that one efficiency determines. The bubble is the work of other ranks: it follows from the rest."""
KERNELS = ("matmul", "attention", "memory")
ROUNDS, MEASUREMENT = 12, 0.02
COUPLING = {**dict.fromkeys(KERNELS, 0.3), "optimizer": 2.0, "communication": 2.0}
"""Iterations of the fit; expected relative error of a measured time; and of each group's factor, from the mean of the
kernels' factors."""


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        config: of the measured run.
        machine: with the fitted efficiencies.
        measured: median seconds of an iteration, at its most frequent batch size and length.
        before: predicted seconds of it with the efficiencies that were given.
        after: with the fitted ones.
        iterations: number of iterations used.
    """

    config: RunConfig
    machine: Hardware
    measured: float
    before: float
    after: float
    iterations: int


@dataclass(frozen=True)
class Measurement:
    """Median seconds of the iterations of one batch size and length, by part; "" is the whole iteration."""

    global_batch: int
    seq_length: int
    seconds: Mapping[str, float]
    count: int


MEASURED = ("global_batch_size", "seq_length", "seconds")
"""Fields of an iteration's record that a calibration needs."""
TIMED: dict[str, tuple[str, ...]] = {
    "optimizer": ("optimizer",),
    "forward-backward": (
        "matmul",
        "attention",
        "elementwise",
        "recompute",
        "tensor_parallel",
        "context_parallel",
        "pipeline",
        "bubble",
    ),
}
"""Timers of metrics.jsonl whose parts of a step are known."""


def run_of(path: Path) -> tuple[RunConfig, str, list[Measurement]]:
    """Return config, device and measurements of the last job in a metrics file.

    Raises:
        ConfigError: the file has no start record, or too few iterations.
        DataError: it cannot be read, or a line is damaged.
    """
    lines = list(scan_lines(path))
    starts = [number for number, (_, record) in enumerate(lines) if record["kind"] == "start"]
    if not starts:
        raise ConfigError(
            f"--calibrate {path} has no record of a run's start",
            fix="Give the metrics.jsonl of a run: it is in its --save folder, or at --metrics-file",
        )
    (start_line, start), job = lines[starts[-1]], lines[starts[-1] + 1 :]
    if not isinstance(start.get("config"), dict):
        raise _damaged(path, start_line, "config is not that of a run")
    iterations = list[dict[str, Any]]()
    for line, record in [pair for pair in job if pair[1]["kind"] == "iteration"][WARM_UP:]:
        timers = record.get("timers", {})
        if wrong := [name for name in MEASURED if not _is_positive(record.get(name))]:
            kind = "numbers" if len(wrong) > 1 else "a number"
            raise _damaged(path, line, f"{' and '.join(wrong)} should be {kind} above 0")
        if not isinstance(timers, dict) or not all(_is_positive(timers[name]) for name in TIMED if name in timers):
            raise _damaged(path, line, "timers should be numbers above 0")
        iterations.append(record)
    if not iterations:
        raise ConfigError(
            f"--calibrate {path} has no iteration after the first {WARM_UP} of its last job",
            fix=f"Train {WARM_UP + 10} iterations or more, and give that run's metrics.jsonl",
        )
    config = from_record(RunConfig, start["config"], str(path))
    return config, str(start.get("device", "")), list(_measurements(iterations))


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and isfinite(value) and value > 0


def _damaged(path: Path, line: bytes, fault: str) -> DataError:
    number = path.read_bytes().split(b"\n").index(line) + 1
    return DataError(
        f"--calibrate {path} has a damaged line {number}: {fault}",
        fix="Give a copy of the file without that line",
    )


def calibrate(config: RunConfig, machine: Hardware, measurements: Iterable[Measurement]) -> Calibration:
    """Return the machine whose predictions of a run agree with its measurements.

    Args:
        config: of the measured run, as in its metrics file: the vocabulary is filled in.
        machine: data sheet, and efficiencies to start from.
        measurements: of run_of.
    """
    measurements = list(measurements)
    main = max(measurements, key=lambda measurement: measurement.count)
    before = step_time_of(config, machine, main.global_batch, main.seq_length).total
    fitted = machine
    for _ in range(ROUNDS):
        rows = [
            row
            for measurement in measurements
            for row in _rows(
                measurement, step_time_of(config, fitted, measurement.global_batch, measurement.seq_length)
            )
        ]
        fitted = _slower(fitted, _factors(rows))
    return Calibration(
        config=config,
        machine=fitted,
        measured=main.seconds[""],
        before=before,
        after=step_time_of(config, fitted, main.global_batch, main.seq_length).total,
        iterations=sum(measurement.count for measurement in measurements),
    )


def _measurements(iterations: list[dict[str, Any]]) -> Iterable[Measurement]:
    by_shape: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for record in iterations:
        by_shape.setdefault((record["global_batch_size"], record["seq_length"]), []).append(record)
    for (batch, length), records in by_shape.items():
        seconds = {"": statistics.median(record["seconds"] for record in records)}
        for timer in TIMED:
            timed = [record["timers"][timer] for record in records if timer in record.get("timers", {})]
            if len(timed) == len(records):
                seconds[timer] = statistics.median(timed)
        yield Measurement(batch, length, seconds, len(records))


def _rows(measurement: Measurement, predicted: StepTime) -> Iterable[tuple[list[float], float]]:
    """Yield the predicted seconds by group, and the measured seconds, of the iteration and each timer."""
    for timer, measured in measurement.seconds.items():
        names = TIMED.get(timer, tuple(predicted.parts))
        groups = [sum(predicted.parts[name] for name in parts if name in names) for parts in GROUPS.values()]
        # The bubble scales with the work.
        work = sum(groups)
        bubble = predicted.bubble if "bubble" in names and work else 0.0
        yield [seconds * (1.0 + bubble / work) if work else 0.0 for seconds in groups], measured


def _factors(rows: list[tuple[list[float], float]]) -> list[float]:
    """Return the factor of each group's seconds: one Gauss-Newton step on the logarithms of all times.

    It minimizes the squared relative errors of the rows, in units of MEASUREMENT, and the squared distances of the
    groups' factors from the mean of the kernels' factors, in units of COUPLING.
    """
    import numpy as np

    matrix, target = [], []
    for seconds, measured in rows:
        total = sum(seconds)
        if total > 0 and measured > 0:
            matrix.append([part / total / MEASUREMENT for part in seconds])
            target.append(float(np.log(measured / total)) / MEASUREMENT)
    for group, coupling in COUPLING.items():
        mean = {other: 1.0 / len(KERNELS) for other in KERNELS}
        matrix.append([((group == other) - mean.get(other, 0.0)) / coupling for other in GROUPS])
        target.append(0.0)
    found, *_ = np.linalg.lstsq(np.array(matrix), np.array(target), rcond=None)
    return [float(factor) for factor in np.exp(np.clip(found, -1.5, 1.5))]


def _slower(machine: Hardware, factors: list[float]) -> Hardware:
    """Return a machine on which each group takes `factor` times as long."""
    factor, own = dict(zip(GROUPS, factors, strict=True)), machine.efficiency
    efficiency = replace(
        own,
        matmul=own.matmul / factor["matmul"],
        attention=own.attention / factor["attention"],
        memory=own.memory / factor["memory"],
        optimizer=own.optimizer / factor["optimizer"],
        link=own.link / factor["communication"],
        network=own.network / factor["communication"],
    )
    device = replace(machine.device, kernel_seconds=machine.device.kernel_seconds * factor["memory"])
    return Hardware(device, machine.per_node, efficiency)
