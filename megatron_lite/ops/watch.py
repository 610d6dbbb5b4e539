"""Status of a run for `megatron-lite watch`: job, progress, speed, checkpoints, disk, loss spikes, slow ranks."""

from __future__ import annotations

import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.ops.watch_job import ACTIVE, JobStatus, Queue, job_status
from megatron_lite.ops.watch_metrics import MetricsReader, metrics_path
from megatron_lite.runs.catalog import latest_iteration, locate
from megatron_lite.runs.manifest import MANIFEST_NAME, read_manifest
from megatron_lite.runs.rollback import ROLLBACKS_NAME
from megatron_lite.schedules.length import last_iteration
from megatron_lite.schedules.saves import save_iterations

SPEED_ITERATIONS = 20
"""Iterations over which the speed is averaged."""


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """Compute time of one rank.

    Attributes:
        rank: its number.
        host: its node.
        seconds: median of its last measurements.
        ratio: to the median of the other ranks with the same pipeline stage.
    """

    rank: int
    host: str
    seconds: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Status of a run at one moment; None: unknown. Times in seconds, sizes in bytes.

    Attributes:
        run: the --save folder.
        job: state of its job.
        iteration: last finished iteration.
        train_iterations: iterations of the whole run.
        age: time since that iteration, or since the start of the job.
        loss: training loss of the last iteration; may be NaN.
        validation: last validation loss by dataset.
        learning_rate, grad_norm, loss_scale, global_batch_size: of the last iteration.
        seconds_per_iteration, tokens_per_second, tflops_per_device, mfu: means over the last iterations.
        eta: remaining time, by the tokens that remain (batch-size ramp-up included); None unless the job trains.
        checkpoint: iteration of the latest checkpoint.
        checkpoint_age: time since it was saved.
        checkpoint_size: bytes of it.
        next_save: iteration of the next save.
        keeps_all: whether the run deletes no checkpoint.
        free: free bytes of the file system of the folder.
        spikes: recorded loss spikes (--spike-factor).
        last_spike: time of the last one, seconds since 1970, and the log message.
        rollbacks: rollbacks of the run, automatic or not.
        ranks: compute time of each rank; empty: not measured.
        started: when the last job began to train, in seconds since 1970.
        world_size: ranks of the last job.
        parameters: of the model.
        device: name of the device.
    """

    run: str
    job: JobStatus
    iteration: int | None = None
    train_iterations: int | None = None
    age: float | None = None
    loss: float | None = None
    validation: Mapping[str, float]
    learning_rate: float | None = None
    grad_norm: float | None = None
    loss_scale: float | None = None
    global_batch_size: int | None = None
    seconds_per_iteration: float | None = None
    tokens_per_second: float | None = None
    tflops_per_device: float | None = None
    mfu: float | None = None
    eta: float | None = None
    checkpoint: int | None = None
    checkpoint_age: float | None = None
    checkpoint_size: int | None = None
    next_save: int | None = None
    keeps_all: bool = True
    free: int | None = None
    spikes: int = 0
    last_spike: tuple[float, str] | None = None
    rollbacks: int = 0
    ranks: Sequence[RankTime] = ()
    started: float | None = None
    world_size: int | None = None
    parameters: int | None = None
    device: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values; a number that is not finite becomes a string."""
        return {name: _json(value) for name, value in asdict(self).items()}


class RunWatch:
    """Observes one run; keeps what it has read between two observations.

    Args:
        folder: the --save folder; it need not exist.
        queue: Slurm's queue, shared by the runs.
        jobs: numbers of further Slurm jobs of the run.
        clock: seconds since 1970; injected by tests.
    """

    def __init__(
        self, folder: Path, queue: Queue, *, jobs: Sequence[str] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = folder
        self.metrics = MetricsReader(metrics_path(folder))
        self._queue = queue
        self._jobs = jobs
        self._clock = clock
        self._sizes: dict[tuple[Path, int], int | None] = {}
        self._config: tuple[float, RunConfig | None] = (0.0, None)

    def observe(self) -> RunStatus:
        """Return the run's status now."""
        if not self.metrics.path.exists():
            self.metrics.path = metrics_path(self.folder)
        now, metrics = self._clock(), self.metrics
        metrics.refresh()
        job = job_status(self.folder, self._queue, last_record=metrics.last_time, jobs=self._jobs, now=now)
        last = metrics.recent[-1] if metrics.recent else {}
        speed = _steady(list(metrics.recent)[-SPEED_ITERATIONS:], metrics.start)
        changed = max(metrics.last_time, job.since) if job.state in ACTIVE else metrics.last_time
        config, start = self._run_config(), metrics.start
        spikes = [(when, match[0]) for when, match in metrics.spikes]
        eta: Any = last.get("eta_seconds") if job.state == "running" else None
        return RunStatus(
            run=str(self.folder),
            job=job,
            iteration=last.get("iteration", start.get("start_iteration")),
            train_iterations=last.get("train_iterations", start.get("train_iterations")),
            age=max(0.0, now - changed) if changed else None,
            loss=last.get("losses", {}).get("lm loss"),
            validation={name: points[-1][1] for name, points in metrics.curve.items() if name},
            learning_rate=last.get("learning_rate"),
            grad_norm=last.get("grad_norm"),
            loss_scale=last.get("loss_scale"),
            global_batch_size=last.get("global_batch_size"),
            seconds_per_iteration=_mean(speed, "seconds"),
            tokens_per_second=_weighted(speed, "tokens_per_second"),
            tflops_per_device=_weighted(speed, "tflops_per_device"),
            mfu=_weighted(speed, "mfu"),
            eta=max(0.0, eta - (now - changed)) if _number(eta) else None,
            **self._checkpoint(config, last.get("iteration", 0), now),
            free=self._free(),
            spikes=len(spikes),
            last_spike=spikes[-1] if spikes else None,
            rollbacks=self._rollbacks(),
            ranks=rank_times(metrics.rank_seconds, start),
            started=start.get("time"),
            world_size=start.get("world_size"),
            parameters=start.get("parameters"),
            device=start.get("device", ""),
        )

    def _run_config(self) -> RunConfig | None:
        """Return the configuration of the last start; None: there is none, or it is of another version."""
        record = self.metrics.start
        if record and self._config[0] != record.get("time"):
            try:
                self._config = record.get("time", 0.0), from_record(RunConfig, record["config"])
            except (MegatronLiteError, KeyError, TypeError, ValueError):
                self._config = record.get("time", 0.0), None
        return self._config[1] if record else None

    def _checkpoint(self, config: RunConfig | None, iteration: int, now: float) -> dict[str, Any]:
        found: dict[str, Any] = {"keeps_all": config is None or not config.checkpoint.keep_last}
        if config is not None and config.checkpoint.save:
            found["next_save"] = _next_save(config, iteration)
        saved = None
        try:
            saved = latest_iteration(self.folder)
            if saved is None:
                return found
            path = locate(self.folder, saved)
            changed = (path / MANIFEST_NAME).stat().st_mtime
        except OSError:  # it is being replaced, or was removed, or the folder is not readable
            return {**found, "checkpoint": saved}
        key = path, int(changed)
        if key not in self._sizes:
            try:
                self._sizes = {key: read_manifest(path).size}
            except MegatronLiteError:
                self._sizes = {key: None}
        age = max(0.0, now - changed)
        return {**found, "checkpoint": saved, "checkpoint_age": age, "checkpoint_size": self._sizes[key]}

    def _free(self) -> int | None:
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return None

    def _rollbacks(self) -> int:
        try:
            return len((self.folder / ROLLBACKS_NAME).read_bytes().splitlines())
        except OSError:
            return 0


def rank_times(measurements: Sequence[Sequence[float]], start: Mapping[str, Any]) -> list[RankTime]:
    """Return the compute time of each rank, in order of ranks.

    Pipeline stages have different work, so a rank is compared with the other ranks of its own stage, or with all
    ranks if it is the only one there.

    Args:
        measurements: the last ones, each with the seconds of every rank; 0: unknown.
        start: the start record, with hosts and layout.
    """
    world = len(measurements[-1]) if measurements else 0
    rows = [row for row in measurements if len(row) == world]
    hosts = start.get("hosts", [])
    seconds = [
        median(known) if (known := [row[rank] for row in rows if row[rank] > 0]) else 0.0 for rank in range(world)
    ]
    stages = start.get("config", {}).get("parallel", {}).get("pp", 1)
    per_stage = world // stages if stages and world % stages == 0 and world > stages else world
    found = []
    for rank, own in enumerate(seconds):
        first = rank // per_stage * per_stage
        others = [
            value for peer, value in enumerate(seconds[first : first + per_stage], first) if value > 0 and peer != rank
        ]
        if own > 0:
            host = hosts[rank] if rank < len(hosts) else ""
            found.append(RankTime(rank=rank, host=host, seconds=own, ratio=own / median(others) if others else 1.0))
    return found


def _next_save(config: RunConfig, iteration: int) -> int:
    """Return the iteration of the first save after `iteration`; the end of the run is saved in any case."""
    last = last_iteration(config)
    for due in save_iterations(config.checkpoint, last):
        if due[-1] > iteration:
            return due[bisect_right(due, iteration)]
    return last


def _steady(records: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records without the first iteration of the job, which compiles and allocates, if there are others."""
    timed = [record for record in records if _number(record.get("seconds"))]
    first = start.get("start_iteration", -1) + 1
    return [record for record in timed if record.get("iteration") != first] or timed


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if _number(record.get(name))]
    return sum(values) / len(values) if values else None


def _weighted(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a rate over time."""
    known = [(record[name], record["seconds"]) for record in records if _number(record.get(name))]
    total = sum(seconds for _, seconds in known)
    return sum(rate * seconds for rate, seconds in known) / total if total > 0 else None


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return value
