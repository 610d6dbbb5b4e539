"""Evaluation report: tables of results and of checkpoints, JSON records, and curves over the checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lite.formatting import format_perplexity
from megatron_lite.metrics.curve import LossCurve
from megatron_lite.runs.evaluations import Evaluation, job_key

_LABELS = {
    "cut_passages": "cut",
    "bits_per_byte": "bits/byte",
    "bits_per_character": "bits/char",
    "mean_bits_per_byte": "mean b/byte",
    "word_perplexity": "word ppl",
}
_HIDDEN = ("bytes", "characters")
"""Sizes that are in the JSON only: a table has at most 80 columns."""
_WIDTH = 13
_STDERR = "_stderr"


def json_record(one: Evaluation) -> dict[str, Any]:
    """Return a result as JSON values; a number that is not finite is a string."""
    return {
        "task": one.task,
        "name": one.name,
        **one.settings,
        **_json_metrics(one.metrics),
        **({"parts": {name: _json_metrics(part) for name, part in one.parts.items()}} if one.parts else {}),
    }


def format_results(results: Sequence[Evaluation]) -> str:
    """Return a table of at most 80 columns; names have lines of their own.

    A line of labels precedes each series of results that have the same metrics.
    """
    lines: list[str] = []
    header: list[str] = []
    for one in results:
        names = _shown(one.metrics)
        if names != header:
            lines.append("".join(f" {_label(name):>{_WIDTH - 1}}" for name in names))
            header = names
        lines.append(one.title)
        lines.append(_values(one.metrics, names))
        for part, metrics in one.parts.items():
            lines.append(f"  {part}")
            lines.append(_values(metrics, [name for name in names if name in metrics] or _shown(metrics)))
    return "\n".join(lines)


def format_checkpoints(results: Sequence[Evaluation]) -> str:
    """Return tables with a row for each checkpoint and a column for the main metric of each task, five in a table."""
    titles = _titles(results)
    iterations = sorted({one.iteration for one in results})
    values = {(one.iteration, job_key(one.task, one.settings)): one for one in results}
    keys = list(titles)
    lines: list[str] = []
    for first in range(0, len(keys), 5):
        shown = keys[first : first + 5]
        for number, key in enumerate(shown, 1):
            sample = next(one for one in results if job_key(one.task, one.settings) == key)
            lines.append(f"({first + number}) {titles[key]}: {_label(sample.main_metric)}")
        columns = [f"({first + number})" for number in range(1, len(shown) + 1)]
        lines.append(f"{'iteration':>{_WIDTH}}" + "".join(f"{column:>{_WIDTH}}" for column in columns))
        for iteration in iterations:
            cells = [values.get((iteration, key)) for key in shown]
            texts = ["-" if one is None else _format(one.main_metric, one.metrics[one.main_metric]) for one in cells]
            lines.append(f"{iteration:{_WIDTH},}" + "".join(f"{text:>{_WIDTH}}" for text in texts))
    return "\n".join(lines)


def metric_texts(one: Evaluation) -> dict[str, str]:
    """Return the metrics of a result that tables show, as text with their standard errors, by name."""
    return {name: _value(one.metrics, name) for name in _shown(one.metrics)}


def curves(results: Sequence[Evaluation]) -> dict[str, LossCurve]:
    """Return a curve over the iterations for each main metric, with a series for each task; one point is no curve."""
    titles = _titles(results)
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in sorted(results, key=lambda entry: entry.iteration):
        value = one.metrics.get(one.main_metric, math.nan)
        if math.isfinite(value):
            of_metric = series.setdefault(one.main_metric, {})
            title = titles[job_key(one.task, one.settings)]
            of_metric.setdefault(title, []).append((float(one.iteration), float(value)))
    return {
        metric: LossCurve(_label(metric), (), {name: tuple(points) for name, points in of_metric.items()}, metric)
        for metric, of_metric in series.items()
        if any(len(points) > 1 for points in of_metric.values())
    }


def _titles(results: Sequence[Evaluation]) -> dict[tuple[str, str], str]:
    """Return the title of each job, in the order of the results."""
    return {job_key(one.task, one.settings): one.title for one in results}


def _shown(metrics: Mapping[str, float]) -> list[str]:
    return [name for name in metrics if name not in _HIDDEN and not name.endswith(_STDERR)]


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _values(metrics: Mapping[str, float], names: Sequence[str]) -> str:
    return "".join(f" {_value(metrics, name):>{_WIDTH - 1}}" for name in names)


def _value(metrics: Mapping[str, float], name: str) -> str:
    text, error = _format(name, metrics[name]), metrics.get(f"{name}{_STDERR}")
    return text if error is None or not math.isfinite(error) else f"{text} ±{error:.3f}"


def _format(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return format_perplexity(value) if "perplexity" in name else f"{value:.4f}"


def _json_metrics(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int) or math.isfinite(value) else ("NaN" if math.isnan(value) else "Infinity")
        for name, value in metrics.items()
    }
