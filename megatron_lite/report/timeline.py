"""Accounting of a run's time: training by part, evaluation, saves, start-up, work lost to restarts, time between jobs.

Times come from the records of metrics.jsonl (runs/metrics_file.py: seconds_of). What no record accounts for is `other`:
logging, checks of replicas, the end of a job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.report.run_log import RunLog
from megatron_lite.runs.metrics_file import seconds_of

COMPUTE, COMMUNICATION, DATA, OPTIMIZER = "compute", "communication and waiting", "data", "optimizer"
TRAINING = "iterations"
"""Part of runs whose iterations were not measured by part."""
EVALUATION, SAVES, START, LOST, OTHER = "evaluation", "saves", "start-up", "lost to restarts", "other"
BETWEEN = "between jobs"
_PART_OF = {"validation": EVALUATION, "save": SAVES, "start": START, "discarded": LOST}


@dataclass(frozen=True)
class Timeline:
    """Seconds of a run.

    Attributes:
        wall: from the start of the first job to the last record.
        parts: seconds by part, in the order of a report; they add up to `wall`.
        device_seconds: seconds of all jobs times their devices.
        iterations: seconds of the iterations that count.
        measured: iterations whose parts were measured.
        jobs: number of jobs, those whose records were removed by a later one included.
        lost_iterations: iterations that restarts and rollbacks discarded.
    """

    wall: float
    parts: Mapping[str, float]
    device_seconds: float
    iterations: float
    measured: int
    jobs: int
    lost_iterations: int

    @property
    def job_seconds(self) -> float:
        """Return the seconds in which a job held the devices."""
        return self.wall - self.parts[BETWEEN]

    @property
    def goodput(self) -> float:
        """Return the share of the jobs' time that was spent in iterations that count; NaN: unknown."""
        return self.iterations / self.job_seconds if self.job_seconds > 0 else math.nan


def account(log: RunLog) -> Timeline:
    """Return where the time of a run went."""
    sums = dict.fromkeys((EVALUATION, SAVES, START, LOST, BETWEEN), 0.0)
    iterations = float(log.columns["seconds"].sum())
    begin, world, device_seconds, jobs, lost = log.first_time, 0, 0.0, 0, 0
    for event in log.events:
        seconds = seconds_of(event.values)
        sums[_PART_OF[event.kind]] += seconds
        gap = 0.0
        if event.kind == "discarded":
            lost += int(event.values["iterations"])
            jobs += int(event.values["starts"])
            # Without a removed start, the difference is logging and the end of the job.
            gap = max(0.0, event.time - event.before - seconds) if event.values["starts"] else 0.0
            device_seconds -= gap * world
        elif event.kind == "start":
            jobs += not event.values.get("after_rollback", False)
            began = event.time - seconds
            if event.before:
                gap = max(0.0, began - event.before)
                device_seconds += max(0.0, event.before - begin) * world
            begin, world = began, int(event.values.get("world_size", 1))
        sums[BETWEEN] += gap
    device_seconds += max(0.0, log.last_time - begin) * world
    wall = max(log.last_time - log.first_time, iterations)
    parts = {**_split(log, iterations), **sums}
    parts[OTHER] = max(0.0, wall - sum(parts.values()))
    parts[BETWEEN] = parts.pop(BETWEEN)  # last: no job held the devices
    return Timeline(wall, parts, max(0.0, device_seconds), iterations, len(log.parts), max(jobs, 1), lost)


def _split(log: RunLog, iterations: float) -> dict[str, float]:
    """Return the seconds of iterations by part, from the shares in the measured ones."""
    total = sum(seconds for seconds, _ in log.parts)
    if not total:
        return {TRAINING: iterations}
    shares = {
        name: min(1.0, sum(parts.get(name, 0.0) for _, parts in log.parts) / total)
        for name in ("compute", "data", "gradients", "optimizer")
    }
    rest = max(0.0, 1.0 - sum(shares.values())) if log.start.get("world_size", 1) > 1 else 0.0
    seconds = {
        COMPUTE: shares["compute"],
        COMMUNICATION: shares["gradients"] + rest,
        DATA: shares["data"],
        OPTIMIZER: shares["optimizer"],
    }
    return {name: share * iterations for name, share in seconds.items()}
