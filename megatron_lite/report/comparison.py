"""HTML comparison of several runs: curves over tokens, samples and iterations, key figures, differing settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.evaluation.report import metric_texts
from megatron_lite.formatting import format_short
from megatron_lite.report.chart import Chart, Line, average_line, draw
from megatron_lite.report.html import Markup, details, document, duration, percent, section, table
from megatron_lite.report.page import describe_machine, describe_model, key_figures, pair
from megatron_lite.report.run_charts import QUANTITIES, X_FIELDS, final_loss, loss_views, validation_lines, varies
from megatron_lite.report.run_log import LOSS, RunLog, loss_text
from megatron_lite.report.settings import setting_name, setting_text
from megatron_lite.report.timeline import BETWEEN, account
from megatron_lite.runs.comparison import compare_configs
from megatron_lite.runs.evaluations import Evaluation, job_key, read_evaluations
from megatron_lite.runs.metrics_file import is_average

MACHINE_SECTIONS = ("checkpoint", "metrics", "profile", "runtime")
"""Sections of the configuration that do not change what is learned."""


def comparison_page(logs: Sequence[RunLog]) -> str:
    """Return the comparison of at least two runs as one HTML page."""
    names = _names(logs)
    runs = dict(zip(names, logs, strict=True))
    learned, other = _differences(runs)
    title = " and ".join((", ".join(names[:-1]), names[-1]))
    lead = "".join(
        f"<li><i class='c{number}'></i><span><b>{escape(name)}</b> "
        f"{escape(describe_model(log))} · {escape(describe_machine(log))}</span></li>"
        for number, (name, log) in enumerate(runs.items(), 1)
    )
    body = (
        f"<header><h1>{escape(title)}</h1><ul class='legend runs'>{lead}</ul>"
        + "".join(f"<p class='note'>{escape(note)}</p>" for note in same_runs(logs))
        + "</header>"
        + section("loss", "Loss", _losses(runs, "Training loss", _training_line))
        + section("validation", "Validation", _losses(runs, "Validation loss", _validation_line))
        + section("figures", "Key figures", _figures(runs))
        + section("settings", "Settings that differ", learned, details("Saves, metrics and machine", other))
        + section("training", "Training and speed", pair(_charts(runs)))
        + section("time", "Time", _time(runs))
        + section("evaluations", "Evaluations", _evaluations(runs))
        + section("environment", "Environment", _environment(runs))
    )
    return document(f"{title} · megatron-lite", body)


def same_runs(logs: Sequence[RunLog]) -> list[str]:
    """Return a note for each run that is given more than once, also by another path."""
    names: dict[Path, list[str]] = {}
    for name, log in zip(_names(logs), logs, strict=True):
        names.setdefault(log.path.resolve(), []).append(name)
    return [f"{' and '.join(equal)} are the same run: {path}" for path, equal in names.items() if len(equal) > 1]


def _names(logs: Sequence[RunLog]) -> list[str]:
    """Return a distinct name for each run: the shortest end of its path that no other run has."""
    for depth in range(1, 10):
        names = ["/".join(log.folder.resolve().parts[-depth:]) for log in logs]
        if len(set(names)) == len(names):
            return names
    return [f"{log.name}/{log.path.name} ({number})" for number, log in enumerate(logs, 1)]


def _losses(runs: Mapping[str, RunLog], title: str, line: Callable[[str, RunLog, str, int], Line | None]) -> str:
    """Return a chart of one loss of each run, over tokens, samples or iterations."""
    charts = []
    for x_name in reversed(X_FIELDS):
        lines = [line(name, log, x_name, number) for number, (name, log) in enumerate(runs.items(), 1)]
        found = [one for one in lines if one is not None]
        charts.append(Chart(title, "nats per token", found, value="loss", x_name=x_name))
    return loss_views(title.split()[0].lower(), charts)


def _training_line(name: str, log: RunLog, x_name: str, colour: int) -> Line | None:
    return average_line(name, log.columns[X_FIELDS[x_name]], log.losses[LOSS], colour, loss_text(final_loss(log)))


def _validation_line(name: str, log: RunLog, x_name: str, colour: int) -> Line | None:
    lines = [line for line in validation_lines(log, x_name, first_colour=colour) if len(line.series)]
    if not lines:
        return None
    chosen = lines[-1] if is_average(lines[-1].name) else lines[0]
    return replace(chosen, name=name, colour=colour)


def _charts(runs: Mapping[str, RunLog]) -> list[str]:
    found = []
    for field in ("learning_rate", "grad_norm", "tokens_per_second", "mfu", "global_batch_size"):
        if field == "global_batch_size" and not any(varies(log.columns[field]) for log in runs.values()):
            continue
        title, value = QUANTITIES[field]
        lines = [
            average_line(name, log.columns["iteration"], log.columns[field], number)
            for number, (name, log) in enumerate(runs.items(), 1)
        ]
        known = [line for line in lines if line is not None]
        chart = Chart(title, "", known, value=value, robust=field != "learning_rate")
        if not chart.is_empty:
            found.append(draw(chart))
    return found


def _figures(runs: Mapping[str, RunLog]) -> str:
    columns = [{label: (value, note) for label, value, note in key_figures(log, account(log))} for log in runs.values()]
    at_tokens, losses = _common_tokens(runs)
    rows = [[at_tokens, *losses]]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label, ("", "")) for column in columns]
        rows.append([label, *(f"{value} ({note})" if note else value for value, note in cells)])
    return table(("", *runs), [row for row in rows if any(row[1:])])


def _common_tokens(runs: Mapping[str, RunLog]) -> tuple[str, list[str]]:
    """Return the label and each run's training loss at the number of tokens that all of them have reached."""
    reached = [log.last("consumed_train_tokens") for log in runs.values()]
    if not all(map(math.isfinite, reached)):
        return "", ["" for _ in runs]
    common, cells = min(reached), []
    for log in runs.values():
        line = _training_line("", log, "tokens", 1)
        tokens, losses = log.columns["consumed_train_tokens"], log.losses[LOSS]
        at = min(int(np.searchsorted(tokens, common)), len(losses) - 1)
        diverged = any(some.first <= log.columns["iteration"][at] <= some.last for some in log.not_finite)
        value = losses[at] if diverged or line is None else np.interp(common, line.series.x, line.series.y)
        cells.append("" if line is None and not diverged else loss_text(float(value)))
    return f"Training loss at {format_short(common)} tokens", cells


def _differences(runs: Mapping[str, RunLog]) -> tuple[str, str]:
    """Return tables of the settings that differ: those that change what is learned, and the others."""
    configs = [log.config for log in runs.values()]
    paths = dict.fromkeys(one.path for config in configs[1:] for one in compare_configs(configs[0], config))
    tables = []
    for machine in (False, True):
        rows = [
            [Markup(f"<code>{escape(setting_name(path))}</code>"), *(_shown(config, path) for config in configs)]
            for path in paths
            if (path.partition(".")[0] in MACHINE_SECTIONS) == machine
        ]
        tables.append(table(("setting", *runs), rows))
    learned, other = tables
    return learned or "<p class='note'>No setting that changes what is learned differs.</p>", other


def _shown(config: Mapping[str, Any], path: str) -> str:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return setting_text(path, value)


def _time(runs: Mapping[str, RunLog]) -> str:
    timelines = [account(log) for log in runs.values()]
    rows = []
    for part in dict.fromkeys(part for timeline in timelines for part in timeline.parts):
        cells = []
        for timeline in timelines:
            seconds = timeline.parts.get(part, 0.0)
            share = f" ({percent(seconds / timeline.job_seconds)})" if part != BETWEEN and timeline.job_seconds else ""
            cells.append(f"{duration(seconds)}{share}" if seconds else "")
        rows.append([part, *cells])
    return table(("part", *runs), [row for row in rows if any(row[1:])])


def _evaluations(runs: Mapping[str, RunLog]) -> str:
    """Return the result of each task on the last checkpoint of each run that was evaluated."""
    found: dict[tuple[str, str], dict[str, Evaluation]] = {}
    for name, log in runs.items():
        for one in read_evaluations(log.folder):
            found.setdefault(job_key(one.task, one.settings), {})[name] = one
    rows = []
    for results in found.values():
        sample = next(iter(results.values()))
        cells = {name: f"{metric_texts(one)[one.main_metric]} (at {one.iteration:,})" for name, one in results.items()}
        rows.append([f"{sample.title}: {sample.main_metric}", *(cells.get(name, "") for name in runs)])
    return table(("task", *runs), rows)


def _environment(runs: Mapping[str, RunLog]) -> str:
    columns = [
        {
            "devices": f"{log.start.get('world_size', 1)} x {log.start.get('device', 'unknown')}",
            **log.start.get("environment", {}),
        }
        for log in runs.values()
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    return table(("", *runs), ([name, *(column.get(name, "") for column in columns)] for name in names))
