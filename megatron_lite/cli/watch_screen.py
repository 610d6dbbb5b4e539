"""Screen of `megatron-lite watch`: table of runs, details of one run, loss curve, slow ranks and alerts, with rich."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_lite.formatting import format_count, format_duration, format_parameters, format_short, format_size
from megatron_lite.metrics.curve import LossCurve
from megatron_lite.metrics.curve_terminal import draw_terminal
from megatron_lite.ops.watch import RunStatus
from megatron_lite.ops.watch_alerts import Alert

MIN_CHART = 5
"""Rows below which no loss curve is drawn."""
SLOW_SHOWN = 5
COLORS = {
    "running": "green",
    "starting": "cyan",
    "queued": "cyan",
    "waiting": "cyan",
    "completed": "green",
    "paused": "yellow",
    "busy": "yellow",
}


@dataclass(frozen=True)
class View:
    """One run with what the screen shows of it.

    Attributes:
        status: at this moment.
        curve: points (iteration, loss) by series; "" is the training loss.
        alerts: those that hold.
    """

    status: RunStatus
    curve: Mapping[str, Sequence[tuple[float, float]]]
    alerts: Sequence[Alert]


def screen(views: Sequence[View], selected: int, *, width: int, height: int, unicode: bool, keys: str = "") -> Group:
    """Return the whole screen.

    Args:
        views: one or several runs; with several, a table of all comes first.
        selected: whose details are shown.
        width: columns.
        height: rows; the loss curve takes those that are left.
        unicode: whether the terminal's encoding has block and braille characters.
        keys: help line at the bottom; empty: none.
    """
    parts: list[RenderableType] = []
    if len(views) > 1:
        parts += [_overview(views, selected, width=width, unicode=unicode), Text()]
    view = views[selected]
    rows = list(details(view.status))
    alerts = [Text(f"ALERT {alert.message}", style="bold red") for shown in views for alert in shown.alerts]
    used = len(parts) + (len(views) + 1) * (len(views) > 1) + 2 + keys.count("\n") + bool(keys)
    used += sum(1 + len(text) // max(20, width - 12) for _, text, _ in rows)
    used += sum(1 + len(alert.plain) // max(20, width) for alert in alerts)
    parts += [*alerts, Text(view.status.run, style="bold", overflow="fold"), _grid(rows)]
    # The drawing has a title, a legend and two lines of axis besides its rows.
    chart = _chart(view.curve, width, height - used - 3, unicode=unicode)
    if chart:
        parts.append(Text(chart, no_wrap=True, overflow="crop"))
    if keys:
        parts.append(Text(keys, style="dim"))
    return Group(*parts)


def details(status: RunStatus) -> Iterator[tuple[str, str, str]]:
    """Yield label, text and style of each line about a run."""
    job = status.job
    yield "state", _dotted(job.state, job.reason), COLORS.get(job.state, "red")
    if job.queued is not None or job.next is not None or job.queue_problem:
        yield "Slurm", _queue_text(status), ""
    if status.iteration is not None:
        total = status.train_iterations
        share = (
            f"{status.iteration:,} of {total:,} ({status.iteration / total:.1%})" if total else f"{status.iteration:,}"
        )
        yield "iteration", _dotted(share, _ago(status.age), status.eta is not None and f"ETA {_time(status.eta)}"), ""
    if status.loss is not None:
        validation = [f"{name} {loss:.4f}" for name, loss in status.validation.items()]
        yield "loss", _dotted(f"{status.loss:.4f}", *validation), "" if math.isfinite(status.loss) else "bold red"
    if status.learning_rate is not None:
        norm = status.grad_norm is not None and f"grad norm {status.grad_norm:.3f}"
        scale = status.loss_scale not in (None, 1.0) and f"loss scale {status.loss_scale:g}"
        batch = status.global_batch_size is not None and f"batch {status.global_batch_size:,}"
        yield "step", _dotted(f"lr {status.learning_rate:.3e}", norm, batch, scale), ""
    if status.tokens_per_second is not None:
        yield "speed", _speed(status), ""
    if status.checkpoint is not None or status.next_save is not None:
        yield "checkpoint", _checkpoint(status), ""
    if status.free is not None:
        size = status.checkpoint_size
        room = size and f"room for {format_count(status.free // size, 'save')}"
        yield "disk", _dotted(f"{format_size(status.free)} free", room), ""
    if status.spikes or status.rollbacks:
        when = status.last_spike is not None and f"the last {format_duration(time.time() - status.last_spike[0])} ago"
        spikes, rollbacks = format_count(status.spikes, "loss spike"), format_count(status.rollbacks, "rollback")
        yield "spikes", _dotted(spikes, when, rollbacks), ""
    if status.ranks:
        yield "ranks", _ranks(status), ""


def _overview(views: Sequence[View], selected: int, *, width: int, unicode: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", expand=True)
    table.add_column("", width=1)
    table.add_column("run", ratio=1, no_wrap=True, overflow="ellipsis", min_width=8)
    titles = ("state", "iteration", "loss", "ETA", "tokens/s", "saved")[: 6 if width >= 76 else 4]
    for title in titles:
        table.add_column(title, no_wrap=True, justify="left" if title == "state" else "right")
    names = _short_names([view.status.run for view in views])
    for number, (name, view) in enumerate(zip(names, views, strict=True)):
        status, speed = view.status, view.status.tokens_per_second
        cells = (
            Text(status.job.state, style="bold red" if view.alerts else COLORS.get(status.job.state, "")),
            "" if status.iteration is None else f"{status.iteration:,}",
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.eta is None else _time(status.eta),
            "" if speed is None or status.job.state != "running" else format_short(speed),
            "" if status.checkpoint_age is None else _time(status.checkpoint_age),
        )
        mark = ("▶" if unicode else ">") if number == selected else ""
        table.add_row(mark, Text(name), *cells[: len(titles)])
    return table


def _short_names(runs: Sequence[str]) -> list[str]:
    """Return the last part of each folder, or the whole folder where the last parts are equal."""
    names = [Path(run).name or run for run in runs]
    return [run if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _grid(rows: Sequence[tuple[str, str, str]]) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=10, style="dim")
    grid.add_column(ratio=1, overflow="fold")
    for label, text, style in rows:
        grid.add_row(label, Text(text, style=style))
    return grid


def _chart(curve: Mapping[str, Sequence[tuple[float, float]]], width: int, rows: int, *, unicode: bool) -> str:
    series = {name: tuple(points) for name, points in curve.items() if points}
    if not series or rows < MIN_CHART:
        return ""
    drawn = LossCurve("", series.pop("", ()), series)
    return draw_terminal(drawn, width, min(rows, 24), unicode=unicode).partition("\n")[2].rstrip("\n")


def _queue_text(status: RunStatus) -> str:
    job, parts = status.job.queued, []
    if job is not None and job.state == "PENDING":
        start = f"starts about {_clock(job.start)}" if job.start else "no estimate of the start"
        parts += [f"job {job.job} pending", job.reason, start]
    elif job is not None:
        limit = f"time limit in {_time(job.end - time.time())}" if job.end else ""
        parts += [f"job {job.job} {job.state.lower()}", job.nodes and f"on {job.nodes}", limit]
    if status.job.next is not None:
        parts.append(f"then job {status.job.next.job} ({status.job.next.reason})")
    if status.job.queue_problem:
        parts.append(status.job.queue_problem)
    return _dotted(*parts)


def _speed(status: RunStatus) -> str:
    seconds, tflops, mfu = status.seconds_per_iteration, status.tflops_per_device, status.mfu
    return _dotted(
        seconds is not None and f"{seconds:.3g} s per iteration",
        status.tokens_per_second is not None and f"{format_short(status.tokens_per_second)} tokens/s",
        tflops is not None and f"{tflops:.3g} TFLOP/s per device",
        mfu is not None and f"MFU {mfu:.1%}",
        status.parameters and f"{format_parameters(status.parameters)} parameters",
    )


def _checkpoint(status: RunStatus) -> str:
    if status.checkpoint is None:
        return _dotted("none yet", f"next save at {status.next_save:,}")
    size = status.checkpoint_size is not None and format_size(status.checkpoint_size)
    due = status.next_save is not None and status.job.wanted and f"next save at {status.next_save:,}"
    return _dotted(f"iteration {status.checkpoint:,}", _ago(status.checkpoint_age), size, due)


def _ranks(status: RunStatus) -> str:
    usual = median(rank.seconds for rank in status.ranks)
    slowest = sorted(status.ranks, key=lambda rank: -rank.ratio)[:SLOW_SHOWN]
    named = (f"rank {rank.rank} {rank.host} {rank.seconds:.3g} s ({rank.ratio:.2f}x)" for rank in slowest)
    return _dotted(f"{len(status.ranks)} compute {usual:.3g} s", "slowest: " + ", ".join(named))


def _dotted(*parts: str | int | float | bool | None) -> str:
    """Return the parts that are not empty, with dots between them."""
    return " · ".join(str(part) for part in parts if part)


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f"{_time(seconds)} ago"


def _time(seconds: float) -> str:
    return format_duration(max(0.0, seconds))


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
