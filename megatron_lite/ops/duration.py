"""Time checks before a job is queued: time limit against step time, save interval and duration of a save."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.formatting import format_duration, format_size
from megatron_lite.ops.resources import Resources
from megatron_lite.planner.disk import checkpoint_size
from megatron_lite.planner.hardware import Hardware, device_of_resource
from megatron_lite.planner.step_time import step_time_of
from megatron_lite.runs.metrics_file import metrics_path, read_records, slowest_save
from megatron_lite.schedules.batch_size import final_batch_size
from megatron_lite.schedules.length import last_iteration
from megatron_lite.schedules.saves import FIRST_SAVE_RATE, SAVE_SAFETY, save_budget

RECENT = 50
"""Number of last iterations whose median is the measured step time."""


@dataclass(frozen=True)
class Step:
    """Duration of an iteration.

    Attributes:
        seconds: at the final batch size.
        source: "measured", "--step-seconds", or the assumptions of the estimate.
        estimated: predicted by the planner; errors do not depend on it.
    """

    seconds: float
    source: str
    estimated: bool = False


def step_of(config: RunConfig, resources: Resources, given: float | None) -> Step | None:
    """Return the step time: given, measured in the run's last iterations, or estimated from the GPU's type."""
    if given is not None:
        return Step(given, "--step-seconds")
    if (measured := _measured_step(config)) is not None:
        return Step(measured, "measured")
    options = resources.options
    names = " ".join(options.get(name, "") for name in ("gpus-per-node", "gres", "gpus", "gpus-per-task", "constraint"))
    gpu = device_of_resource(names)
    if gpu is None:
        return None
    machine = Hardware(gpu, resources.gpus_per_node or gpu.per_node)
    batch = final_batch_size(config.batch, config.parallel.dp)
    seconds = step_time_of(config, machine, batch, config.batch.seq_length).total
    return Step(seconds, f"rough estimate for {gpu.family}, as by `megatron-lite plan`", estimated=True)


def _measured_step(config: RunConfig) -> float | None:
    """Return the median time of the run's last iterations in seconds; None: there are no measurements."""
    path = metrics_path(config)
    if path is None:
        return None
    try:
        records = read_records(path)
    except MegatronLiteError:
        return None
    seconds = [float(record["seconds"]) for record in records if record["kind"] == "iteration" and "seconds" in record]
    return statistics.median(seconds[-RECENT:]) if seconds else None


@dataclass(frozen=True)
class Timing:
    """Time of a job, and what happens at its end.

    Attributes:
        limit: time limit in seconds.
        stop: seconds after which the run saves and stops; None: it trains up to the limit.
        save: seconds to keep free for a save; 0: there is no --save.
        save_source: measured or assumed.
        step: duration of an iteration; None: unknown.
        interval: the shortest save interval in iterations; 0: no scheduled saves.
        remaining: iterations up to the end of the run; infinite: unknown until the data of --epochs are open.
    """

    limit: int
    stop: float | None
    save: float
    save_source: str
    step: Step | None
    interval: int
    remaining: float

    @property
    def iterations(self) -> int | None:
        """Number of iterations in one job; None: the step time is unknown."""
        if self.step is None:
            return None
        return int(min(self.remaining, max(0, (self.limit if self.stop is None else self.stop) / self.step.seconds)))


def timing_of(config: RunConfig, resources: Resources, step: Step | None, reached: int) -> Timing | None:
    """Return the timing of a job that resumes after iteration `reached`; None: it has no --time of its own."""
    limit, signal, training = resources.time_limit, resources.signal, config.training
    if limit is None:
        return None
    size, save, source = checkpoint_size(config), 0.0, ""
    if config.checkpoint.save:
        metrics = metrics_path(config)
        slowest = slowest_save(metrics) if metrics is not None else 0.0
        save = save_budget(slowest, size)
        source = (
            f"{SAVE_SAFETY:g} times the slowest measured save"
            if slowest
            else f"assumed for {format_size(size)} at {format_size(FIRST_SAVE_RATE)} per second"
        )
    stops = [training.exit_duration_minutes * 60.0] if training.exit_duration_minutes else []
    if signal is not None:
        stops.append(float(limit - signal[1]))
    if training.exit_before_job_end:
        stops.append(limit - training.job_end_margin - save)
    return Timing(
        limit,
        max(0.0, min(stops)) if min(stops, default=limit) < limit else None,
        save,
        source,
        step,
        min((phase.interval for phase in config.checkpoint.phases if phase.interval), default=0) if save else 0,
        math.inf if config.awaits_epochs else max(0, last_iteration(config) - reached),
    )


def timing_facts(timing: Timing) -> Iterator[tuple[str, str]]:
    """Yield the lines of the plan on time."""
    end = f"saves and stops after {format_duration(timing.stop)}" if timing.stop is not None else "no stop before it"
    kept = f"; {format_duration(timing.save)} for a save ({timing.save_source})" if timing.save else ""
    yield "Time limit", f"{format_duration(timing.limit)}, {end}{kept}"
    step, iterations = timing.step, timing.iterations
    if step is not None and iterations is not None:
        text = f"{_seconds(step.seconds)} s an iteration ({step.source}): about {iterations:,} iterations in one job"
        if iterations and iterations < timing.remaining < math.inf:
            text += f", about {math.ceil(timing.remaining / iterations):,} jobs to the end"
        yield "Step", text
    else:
        yield "Step", "duration unknown before the first job; give --step-seconds S to check it"


def timing_problems(timing: Timing, config: RunConfig) -> Iterator[ConfigError]:
    """Yield an error for each reason why the job ends without a checkpoint of its own."""
    exit_after, limit = config.training.exit_duration_minutes, timing.limit
    if exit_after * 60 >= limit:
        yield ConfigError(
            f"--exit-duration-in-mins {exit_after:g} is not below the time limit of {limit / 60:g} minutes (--time)",
            fix=f"Give --exit-duration-in-mins {max(1, int(limit / 60 * 0.95) - 1)} or less, or a longer --time",
        )
    if timing.save >= limit:
        yield ConfigError(
            f"The time limit of {format_duration(limit)} (--time) is shorter than a save: "
            f"{format_duration(timing.save)}, {timing.save_source}",
            fix="Give a longer --time, or save less with --no-save-optim",
        )
    elif timing.stop == 0:
        yield ConfigError(
            f"No time is left for training: the time limit of {format_duration(limit)} (--time) is needed for the save "
            f"({format_duration(timing.save)}, {timing.save_source}) and the margins before it (--signal, "
            "--job-end-margin-in-secs)",
            fix="Give a longer --time, or smaller margins (--signal, --job-end-margin-in-secs)",
        )
    iterations, step = timing.iterations, timing.step
    if iterations is None or step is None or step.estimated or not timing.interval or timing.remaining <= iterations:
        return
    if (timing.stop and iterations < 1) or (timing.stop is None and timing.interval > iterations):
        yield ConfigError(
            f"The job ends before its first save: about {iterations:,} iterations of {_seconds(step.seconds)} s fit "
            f"into {format_duration(limit)} (--time), and --save-interval is {timing.interval:,}",
            fix=(f"Give --save-interval {max(1, iterations // 2)} or less, or a longer --time")
            if iterations >= 1
            else "Give a --time that is longer than an iteration and a save, or use more nodes",
        )


def timing_warnings(timing: Timing) -> Iterator[str]:
    """Yield a warning for each risk of losing iterations at the time limit."""
    if timing.stop is None:
        yield "nothing stops the run before its time limit: remove --no-exit-before-job-end"
    elif 0 < timing.limit - timing.stop < timing.save < timing.limit:
        yield (
            f"the last save has {format_duration(timing.limit - timing.stop)} before the time limit, and takes "
            f"{format_duration(timing.save)} ({timing.save_source}): stop earlier"
        )
    step, iterations = timing.step, timing.iterations
    if step is None or not step.estimated or iterations is None or timing.stop is not None:
        return
    if timing.interval > iterations < timing.remaining:
        yield f"by the rough estimate the job ends before its first save (--save-interval {timing.interval:,})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:,.0f}"
