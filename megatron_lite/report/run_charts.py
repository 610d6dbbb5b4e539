"""Charts of one run: losses, learning rate, batch, gradient norm, speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_lite.formatting import format_count
from megatron_lite.report.chart import Chart, Line, Mark, draw, line_of
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
SOURCES_SHOWN = 24
WARM_UP = 0.1
"""Share of the run that the second view of the loss leaves out."""


def marks(log: RunLog) -> list[Mark]:
    """Return spikes, rollbacks and restarts, by iteration."""
    found = [
        Mark(
            spike.first,
            "spike",
            f"spike: loss {loss_text(spike.loss)} in iterations {spike.first} to {spike.last}",
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
    charts = {name: _loss(log, name) for name in X_FIELDS}
    figures = [
        (f"by {name}", draw(replace(chart, marks=_moved(events, log, name)), tall=True))
        for name, chart in charts.items()
        if not chart.is_empty
    ]
    reached = log.columns["iteration"]
    if len(reached) >= 20:
        late = replace(charts["iteration"], x_from=float(reached[0] + WARM_UP * (reached[-1] - reached[0])))
        late = replace(late, robust=True, marks=events)
        if not late.is_empty:
            figures.append((f"without the first {WARM_UP:.0%}", draw(late, tall=True)))
    return choice("loss", figures) if figures else ""


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
    lines = [
        replace(
            line, style="plain", series=replace(line.series, y=line.series.smooth), note=f"{line.series.smooth[-1]:.4f}"
        )
        for number, name in enumerate(names[:SOURCES_SHOWN], 1)
        if len((line := line_of(name, x, log.losses[name], number)).series)
    ]
    if not lines:
        return ""
    shown = "" if len(names) <= SOURCES_SHOWN else f"{SOURCES_SHOWN} of "
    title = f"Training loss of {shown}{format_count(len(names), 'data source')}"
    return draw(Chart(title, "moving average", lines, value="loss", robust=True), tall=True)


def training_charts(log: RunLog) -> list[str]:
    """Return learning rate, gradient norm and the other quantities that change during the run."""
    columns = log.columns
    found = [
        _chart(log, "Learning rate", "", columns["learning_rate"], value="power", style="plain"),
        _chart(log, "Gradient norm", "before clipping", columns["grad_norm"], log_scale=True),
    ]
    for name, title, unit in (
        ("global_batch_size", "Global batch", "samples"),
        ("seq_length", "Sequence length", "tokens"),
        ("loss_scale", "Loss scale", ""),
    ):
        if varies(columns[name]):
            found.append(_chart(log, title, unit, columns[name], style="plain", value="whole"))
    for name, title in (("params_norm", "Norm of the parameters"), ("num_zeros", "Zeros in the gradient")):
        if np.isfinite(columns[name]).any():
            found.append(_chart(log, title, "", columns[name]))
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
    found = [
        _speed(log, "Tokens per second", f"all {format_count(world, 'device')}", columns["tokens_per_second"], expected)
    ]
    for name, title, unit, value in (
        ("mfu", "Model FLOP/s utilization (MFU)", "of the device's peak", "percent"),
        ("tflops_per_device", "TFLOP/s per device", "model FLOPs", "short"),
    ):
        values = columns[name]
        if np.isfinite(values).any():
            # Both are proportional to tokens per second, at one sequence length.
            wanted = None if expected is None else expected * np.nanmedian(values / columns["tokens_per_second"])
            found.append(_speed(log, title, unit, values, wanted, value))
            break
    return [figure for figure in found if figure]


def _speed(log: RunLog, title: str, unit: str, values: Column, plan: Column | None, value: str = "short") -> str:
    if not np.isfinite(values).any():
        return ""
    x = log.columns["iteration"]
    # The first iteration after a start includes compilation and allocation.
    lines = [line_of("measured", x, values, 1)]
    if plan is not None and np.isfinite(plan).any():
        lines.append(line_of("plan", x, plan, 2, "dashed"))
    return draw(Chart(title, unit, lines, marks=marks(log), value=value, robust=len(values) > 20))


def _chart(
    log: RunLog,
    title: str,
    unit: str,
    values: Column,
    *,
    style: str = "smooth",
    value: str = "short",
    log_scale: bool = False,
) -> str:
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
