"""Console sink: Megatron's log lines with tokens/s, MFU and ETA appended.

Log parsers for Megatron match ` name: value |`; additional fields follow the same pattern after Megatron's.
Averages over a log interval follow Megatron's rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TextIO

from megatron_lite.config.run import RunConfig
from megatron_lite.formatting import format_duration
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.metrics.sink import Sink


@dataclass(frozen=True, kw_only=True)
class IntervalAverages:
    """Averages over one log interval."""

    losses: Mapping[str, float]
    """Means over the applied iterations that reported the loss."""
    seconds_per_iteration: float
    tokens_per_second: float
    tflops_per_device: float | None
    mfu: float | None
    skipped: int
    nan: int
    timers: Mapping[str, float]
    """Mean seconds per iteration."""


@dataclass
class LogInterval:
    """Accumulates the reports of one log interval.

    As in Megatron, losses are averaged over applied iterations, and times over applied and skipped iterations. Rates
    are ratios of totals, so an interval across a batch-size ramp-up is weighted correctly.
    """

    reports: list[IterationReport] = field(default_factory=list)

    def add(self, report: IterationReport) -> None:
        """Add the report of one iteration."""
        self.reports.append(report)

    def take(self) -> IntervalAverages:
        """Return the averages and start the next interval; at least one report was added."""
        reports, self.reports = self.reports, []
        assert reports, "a log line needs an iteration"
        seconds = sum(report.seconds for report in reports)
        return IntervalAverages(
            losses=_mean_by_name([report.losses for report in reports if not report.skipped]),
            seconds_per_iteration=seconds / len(reports),
            tokens_per_second=sum(report.tokens for report in reports) / seconds if seconds > 0 else 0.0,
            tflops_per_device=_mean_over_time([(report.tflops_per_device, report.seconds) for report in reports]),
            mfu=_mean_over_time([(report.mfu, report.seconds) for report in reports]),
            skipped=sum(report.skipped for report in reports),
            nan=sum(report.nan for report in reports),
            timers=_mean_by_name([report.timers for report in reports]),
        )


def _mean_by_name(rows: list[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(entries) / len(entries) for name, entries in values.items()}


def _mean_over_time(rates: list[tuple[float | None, float]]) -> float | None:
    """Return the time-weighted mean of rates; None if any rate is unknown."""
    known = [(rate, seconds) for rate, seconds in rates if rate is not None]
    total = sum(seconds for _, seconds in known)
    if len(known) < len(rates) or total <= 0:
        return None
    return sum(rate * seconds for rate, seconds in known) / total


def format_iteration(report: IterationReport, averages: IntervalAverages, now: datetime) -> str:
    """Return the log line of one interval with last iteration `report`.

    As in Megatron, a loss whose average is not above zero (NaN, or every iteration was skipped) is omitted.
    """
    fields = [
        f" [{now.strftime('%Y-%m-%d %H:%M:%S.%f')}] iteration {report.iteration:8d}/{report.train_iterations:8d}",
        f"consumed samples: {report.consumed_train_samples:12d}",
    ]
    if report.skipped_train_samples > 0:
        fields.append(f"skipped samples: {report.skipped_train_samples:12d}")
    fields.append(f"elapsed time per iteration (ms): {averages.seconds_per_iteration * 1000.0:.1f}")
    if averages.tflops_per_device is not None:
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {averages.tflops_per_device:.1f}")
    fields.append(f"learning rate: {report.learning_rate:.6E}")
    fields.append(f"global batch size: {report.global_batch_size:5d}")
    fields += [f"{name}: {value:.6E}" for name, value in averages.losses.items() if value > 0.0]
    fields.append(f"loss scale: {report.loss_scale:.1f}")
    if report.grad_norm is not None:
        fields.append(f"grad norm: {report.grad_norm:.3f}")
    if report.num_zeros is not None:
        fields.append(f"num zeros: {report.num_zeros}")
    if report.params_norm is not None:
        fields.append(f"params norm: {report.params_norm:.3f}")
    fields.append(f"number of skipped iterations: {averages.skipped:3d}")
    fields.append(f"number of nan iterations: {averages.nan:3d}")
    fields.append(f"tokens/s: {averages.tokens_per_second:.1f}")
    if averages.mfu is not None:
        fields.append(f"MFU: {averages.mfu * 100.0:.1f}%")
    if report.eta_seconds is not None:
        fields.append(f"ETA: {format_duration(report.eta_seconds)}")
    return " | ".join(fields) + " |"


def format_timers(timers: Mapping[str, float]) -> str:
    """Return the `time (ms)` line; `timers` holds mean seconds per iteration."""
    return "time (ms) | " + " | ".join(f"{name}: {seconds * 1000.0:.2f}" for name, seconds in timers.items())


def format_memory(memory: Mapping[str, int], iteration: int, rank: int) -> str:
    """Return the memory line, in MB of 2^20 bytes; reserved memory is omitted if it equals allocated memory."""
    same = memory.get("reserved") == memory.get("allocated") and memory.get("max_reserved") == memory.get(
        "max_allocated"
    )
    shown = {name: count for name, count in memory.items() if not (same and name.endswith("reserved"))}
    fields = [f"{name.replace('_', ' ')}: {count / 2**20:.1f}" for name, count in shown.items()]
    return f"[Rank {rank}] (after {iteration} iterations) memory (MB) | " + " | ".join(fields)


def perplexity(loss: float) -> float:
    """Return exp(loss), with Megatron's bound on the exponent to avoid overflow in early evaluations."""
    return math.exp(min(20.0, loss))


def format_validation(report: ValidationReport) -> str:
    """Return the line of losses and perplexities between two lines of dashes."""
    suffix = f"-{report.name}" if report.name else ""
    where = f"iteration {report.iteration}" + (f" on {report.split} set" if report.at_end else "")
    line = f"validation{suffix} loss at {where} | "
    for name, value in report.losses.items():
        line += f"{name} value: {value:.6E} | {name} PPL: {perplexity(value):.6E} | "
    dashes = "-" * (len(line) + 1)
    return f"{dashes}\n{line}\n{dashes}"


class ConsoleSink(Sink):
    """Writes one log line per log interval.

    Args:
        write: prints a line given without newline.
        log_interval: iterations per line.
    """

    def __init__(self, write: Callable[[str], None], log_interval: int) -> None:
        self._write = write
        self._log_interval = max(1, log_interval)
        self._interval = LogInterval()
        self._memory: Mapping[str, int] = {}
        self._memory_printed = False
        self._rank = 0

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Store the rank number: the last rank reports."""
        self._rank = facts.world_size - 1

    def iteration(self, report: IterationReport) -> None:
        """Add the iteration; print the line of the interval at its end and at the end of the run."""
        self._interval.add(report)
        self._memory = report.memory or self._memory
        if report.iteration % self._log_interval == 0 or report.iteration == report.train_iterations:
            self._print_interval()

    def _print_interval(self) -> None:
        report = self._interval.reports[-1]
        averages = self._interval.take()
        self._write(format_iteration(report, averages, datetime.now()))
        if averages.timers:
            self._write(format_timers(averages.timers))
        if self._memory and not self._memory_printed:
            # Once, as Megatron: after the first interval every persistent buffer is allocated.
            self._memory_printed = True
            self._write(format_memory(self._memory, report.iteration, self._rank))

    def validation(self, report: ValidationReport) -> None:
        """Print the evaluation."""
        self._write(format_validation(report))

    def message(self, text: str) -> None:
        """Print the text unchanged."""
        self._write(text)

    def stopping(self) -> None:
        """Print the line of an incomplete interval."""
        if self._interval.reports:
            self._print_interval()

    def close(self) -> None:
        """Print the line of an incomplete interval after a failure, when stopping() was not called."""
        self.stopping()


def line_writer(stream: TextIO) -> Callable[[str], None]:
    """Return a function that writes one line to `stream` and flushes it, for `tail -f`."""

    def write(line: str) -> None:
        stream.write(line + "\n")
        stream.flush()

    return write
