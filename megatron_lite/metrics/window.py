"""Averages over a logging interval, by Megatron's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_lite.metrics.report import IterationReport


@dataclass(frozen=True, kw_only=True)
class WindowAverages:
    """What a log line says about its window."""

    losses: Mapping[str, float]
    """Means over the advanced iterations that reported the loss."""
    seconds_per_iteration: float
    tokens_per_second: float
    tflops_per_device: float | None
    mfu: float | None
    skipped: int
    nan: int
    timers: Mapping[str, float]
    """Mean seconds per iteration."""


@dataclass
class Window:
    """Gathers reports until `take` empties it.

    Losses are averaged over advanced iterations (those whose step was applied), times over advanced and skipped ones
    together, as Megatron does. Rates are totals over totals, so a window across a ramp-up step is weighted right.
    """

    reports: list[IterationReport] = field(default_factory=list)

    def add(self, report: IterationReport) -> None:
        """Count one more iteration in."""
        self.reports.append(report)

    def take(self) -> WindowAverages:
        """Return the averages and start the next window; the window holds at least one report."""
        reports, self.reports = self.reports, []
        assert reports, "a log line needs an iteration"
        seconds = sum(report.seconds for report in reports)
        return WindowAverages(
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
    """Mean of rates, each held for its seconds; None if one of them is not known."""
    known = [(rate, seconds) for rate, seconds in rates if rate is not None]
    total = sum(seconds for _, seconds in known)
    if len(known) < len(rates) or total <= 0:
        return None
    return sum(rate * seconds for rate, seconds in known) / total
