"""Charts of one run: losses, learning rate, batch, gradient norm, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_lite.formatting import format_count
from megatron_lite.report.chart import Chart, Line, Mark, average_line, draw, line_of
from megatron_lite.report.html import choice
from megatron_lite.report.plan import RunPlan
from megatron_lite.report.run_log import LOSS, Column, RunLog, loss_of, loss_text
from megatron_lite.runs.metrics_file import is_average

X_FIELDS = {
    "iteration": "iteration",
    "samples": "consumed_train_samples",
    "tokens": "consumed_train_tokens",
}
"""Horizontal axes: name and field."""
QUANTITIES = {
    "learning_rate": ("Learning rate", "power"),
    "grad_norm": ("Gradient norm", "short"),
    "global_batch_size": ("Global batch", "whole"),
    "seq_length": ("Sequence length", "whole"),
    "loss_scale": ("Loss scale", "whole"),
    "params_norm": ("Norm of the parameters", "short"),
    "num_zeros": ("Zeros in the gradient", "short"),
    "tokens_per_second": ("Tokens per second", "short"),
    "mfu": ("Model FLOP/s utilization (MFU)", "percent"),
    "tflops_per_device": ("TFLOP/s per device", "short"),
}
"""Columns with a chart: title, and format of the values (Chart.value)."""
SOURCES_SHOWN = 24
WARM_UP = 0.1
"""Share of the run that the second view of the loss leaves out."""


def marks(log: RunLog) -> list[Mark]:
    """Return spikes, rollbacks and restarts, by iteration."""
    found = [
        Mark(
            spike.first,
            "spike",
            f"spike: loss {loss_text(spike.loss)} in iterations {spike.first} to {spike.last}"
            + (", discarded" if spike.discarded else ""),
            spike.time,
        )
        for spike in log.spikes
    ]
    for some in log.not_finite:
        where = (
            f"from iteration {some.first}"
            if some.last == log.iterations
            else f"in iterations {some.first} to {some.last}"
        )
        where = f"in iteration {some.first}" if some.first == some.last else where
        found.append(Mark(some.first, "non-finite", f"loss is {loss_text(some.loss)} {where}", some.time))
    for record in log.rollbacks:
        skipped = record.get("skipped_samples")
        samples = f", skipping samples {skipped[0]} to {skipped[1] - 1}" if skipped else ""
        kind = "automatic rollback" if record.get("automatic") else "rollback"
        found.append(
            Mark(float(record["to"]), "rollback", f"{kind} to iteration {record['to']}{samples}", float(record["time"]))
        )
    for start in log.starts[1:]:
        if not start.get("after_rollback", False):
            iteration = int(start.get("iteration", 0))
            found.append(Mark(iteration, "restart", f"restart at iteration {iteration}"))
    return sorted(found, key=lambda mark: mark.x)


def loss_chart(log: RunLog) -> str:
    """Return training and validation loss, over iterations, samples or tokens, and without the first part."""
    events = marks(log)
    return loss_views("loss", [replace(_loss(log, name), marks=_moved(events, log, name)) for name in X_FIELDS])


def loss_views(name: str, charts: Sequence[Chart]) -> str:
    """Return charts of a loss of which one is shown, and the first of them without the first iterations.

    Args:
        name: of the choice, unique in the page.
        charts: over different x; those without a point are left out.
    """
    shown = [chart for chart in charts if not chart.is_empty]
    figures = [(f"by {chart.x_name}", draw(chart, tall=True)) for chart in shown]
    for chart in shown[:1]:
        drawn = [line.series for line in chart.lines if len(line.series)]
        first, last = min(series.x[0] for series in drawn), max(series.x[-1] for series in drawn)
        late = replace(chart, x_from=float(first + WARM_UP * (last - first)), robust=True)
        if max(series.count for series in drawn) >= 20 and not late.is_empty:
            figures.append((f"without the first {WARM_UP:.0%}", draw(late, tall=True)))
    return choice(name, figures) if figures else ""


def _loss(log: RunLog, x_name: str) -> Chart:
    lines = []
    x, train = log.columns[X_FIELDS[x_name]], log.losses[LOSS]
    if np.isfinite(train).any():
        lines.append(line_of("training", x, train, 1, note=loss_text(final_loss(log))))
    lines += validation_lines(log, x_name, first_colour=2)
    return Chart("Loss", "nats per token", lines, value="loss", x_name=x_name)


def final_loss(log: RunLog) -> float:
    """Return the mean of the finite training losses of the last 2% of the iterations.

    It is not finite if the last loss is not: the run has diverged. NaN: no loss was recorded.
    """
    if log.not_finite and log.not_finite[-1].last == log.iterations:
        return log.not_finite[-1].loss
    losses = log.losses[LOSS]
    losses = losses[np.isfinite(losses)]
    return float(losses[-max(1, len(losses) // 50) :].mean()) if len(losses) else math.nan


def validation_lines(log: RunLog, x_name: str, *, first_colour: int) -> list[Line]:
    """Return a line for each validation set, the one that is the average last."""
    curves = sorted(log.validation_curves().items(), key=lambda item: is_average(item[0]))
    found = []
    for number, (name, records) in enumerate(curves):
        x = np.array([float(record.get(X_FIELDS[x_name], math.nan)) for record in records])
        losses = np.array([loss_of(record) for record in records])
        found.append(line_of(name, x, losses, first_colour + number, "points", loss_text(losses[-1])))
    return found


def _moved(events: Sequence[Mark], log: RunLog, x_name: str) -> list[Mark]:
    """Return the marks at the x of their iterations."""
    iterations, x = log.columns["iteration"], log.columns[X_FIELDS[x_name]]
    if x_name == "iteration" or not len(iterations):
        return list(events)
    return [replace(mark, x=float(np.interp(mark.x, iterations, x))) for mark in events]


def source_chart(log: RunLog) -> str:
    """Return the training loss of each data source of a blend; empty: there is one source."""
    names = [name for name in log.losses if name != LOSS]
    x = log.columns["iteration"]
    found = [average_line(name, x, log.losses[name], number) for number, name in enumerate(names[:SOURCES_SHOWN], 1)]
    lines = [replace(line, note=f"{line.series.y[-1]:.4f}") for line in found if line is not None]
    if not lines:
        return ""
    shown = "" if len(names) <= SOURCES_SHOWN else f"{SOURCES_SHOWN} of "
    title = f"Training loss of {shown}{format_count(len(names), 'data source')}"
    return draw(Chart(title, "moving average", lines, value="loss", robust=True), tall=True)


def training_charts(log: RunLog) -> list[str]:
    """Return learning rate, gradient norm and the other quantities that change during the run."""
    columns = log.columns
    found = [
        _chart(log, "learning_rate", style="plain"),
        _chart(log, "grad_norm", "before clipping", log_scale=True),
    ]
    for name, unit in (("global_batch_size", "samples"), ("seq_length", "tokens"), ("loss_scale", "")):
        if varies(columns[name]):
            found.append(_chart(log, name, unit, style="plain"))
    found += [_chart(log, name) for name in ("params_norm", "num_zeros")]
    return [figure for figure in found if figure]


def speed_charts(log: RunLog, plan: RunPlan | None = None) -> list[str]:
    """Return tokens per second, and MFU or TFLOP/s per device.

    Args:
        log: of the run.
        plan: predicted seconds of the iterations; None: there is no prediction.
    """
    columns, world = log.columns, max(1, int(log.start.get("world_size", 1)))
    tokens = columns["global_batch_size"] * columns["seq_length"]
    expected = None if plan is None else tokens / plan.seconds
    found = [_speed(log, "tokens_per_second", f"all {format_count(world, 'device')}", expected)]
    for name, unit in (("mfu", "of the device's peak"), ("tflops_per_device", "model FLOPs")):
        values = columns[name]
        if np.isfinite(values).any():
            # Both are proportional to tokens per second, at one sequence length.
            wanted = None if expected is None else expected * np.nanmedian(values / columns["tokens_per_second"])
            found.append(_speed(log, name, unit, wanted))
            break
    return [figure for figure in found if figure]


def _speed(log: RunLog, name: str, unit: str, plan: Column | None) -> str:
    values, (title, value) = log.columns[name], QUANTITIES[name]
    if not np.isfinite(values).any():
        return ""
    x = log.columns["iteration"]
    # The first iteration after a start includes compilation and allocation.
    lines = [line_of("measured", x, values, 1)]
    if plan is not None and np.isfinite(plan).any():
        lines.append(line_of("plan", x, plan, 2, "dashed"))
    return draw(Chart(title, unit, lines, marks=marks(log), value=value, robust=len(values) > 20))


def _chart(log: RunLog, name: str, unit: str = "", *, style: str = "smooth", log_scale: bool = False) -> str:
    values, (title, value) = log.columns[name], QUANTITIES[name]
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    wide = log_scale and len(known) > 1 and known.min() > 0 and known.max() / known.min() > 30
    line = line_of(title.lower(), log.columns["iteration"], values, 1, style)
    return draw(Chart(title, unit, [line], marks=marks(log), value=value, log=bool(wide)))


def varies(values: Column) -> bool:
    """Return whether a column has two different values."""
    known = values[np.isfinite(values)]
    return bool(len(known)) and known.min() != known.max()
