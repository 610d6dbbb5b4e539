"""Report charts: inline SVG that stretches with the page, with HTML labels that keep their font size.

The plot is stretched to the page (preserveAspectRatio="none") with strokes of constant width; page.js reads the points
of the hovered lines from the SVG itself, so that no value is stored twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from megatron_lite.metrics.curve import Axis, make_axis
from megatron_lite.report.series import Series, Values, reduce_series

SCALE = 100_000
"""Width and height of a plot in its own units: five digits of every value."""
COLOURS = 8
"""Colours of page.css, c1 to c8."""
MANY_MARKS = 25
"""Marks of a kind above which they are short."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        series: its points.
        colour: number of the colour, from 1.
        style: smooth (moving average in front of the range of values), plain, dashed, or points (dashed, with markers).
        note: text behind the name in the legend.
    """

    name: str
    series: Series
    colour: int
    style: str = "smooth"
    note: str = ""


@dataclass(frozen=True)
class Mark:
    """Vertical line at an iteration: kind (spike, non-finite, restart, rollback), description, time since 1970 or 0."""

    x: float
    kind: str
    text: str
    time: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: heading.
        unit: of the vertical axis, behind the heading.
        lines: at least one with points.
        marks: events.
        value: format of values in page.js: loss, percent, short, power or whole.
        x_name: of the horizontal axis.
        x_from: first x shown.
        log: logarithmic vertical axis; all values are positive.
        robust: the vertical axis leaves out the highest and lowest 0.5% of the values.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    value: str = "short"
    x_name: str = "iteration"
    x_from: float = -math.inf
    log: bool = False
    robust: bool = False

    @property
    def is_empty(self) -> bool:
        """Return whether no line has a point in the range shown."""
        return not any((line.series.x >= self.x_from).any() for line in self.lines)


def draw(chart: Chart, *, tall: bool = False) -> str:
    """Return the chart as an HTML figure."""
    chart = _within(chart)
    lines = [line for line in chart.lines if len(line.series)]
    across = make_axis(_ends(lines), 6, whole=True)
    up = _vertical(chart, lines, 6 if tall else 4)
    place = _Placement(across, up, chart.log)
    legend = "".join(_legend_entry(line) for line in lines)
    for kind in dict.fromkeys(mark.kind for mark in chart.marks):
        count = sum(mark.kind == kind for mark in chart.marks)
        legend += f"<li><i class='mark {kind}'></i>{kind}{f' ({count:,})' if count > 1 else ''}</li>"
    unit = f" <span>{escape(chart.unit)}</span>" if chart.unit else ""
    return (
        f"<figure class='chart{' tall' if tall else ''}'><figcaption>{escape(chart.title)}{unit}</figcaption>"
        f"<div class='plot'>{_vertical_labels(up, place, chart)}<div class='area'>"
        f"<svg viewBox='0 0 {SCALE} {SCALE}' preserveAspectRatio='none' role='img' "
        f"aria-label='{escape(_description(chart, lines), quote=True)}' data-x='{across.low},{across.high}' "
        f"data-y='{up.low},{up.high}' data-log='{int(chart.log)}' data-value='{chart.value}' "
        f"data-x-name='{chart.x_name}'>"
        f"{_grid(up, place)}"
        f"{_marks(chart.marks, place)}{''.join(_line(line, place) for line in lines)}"
        f"</svg></div>{_horizontal_labels(across, place)}<div class='x-name'>{chart.x_name}</div></div>"
        f"<ul class='legend'>{legend}</ul></figure>"
    )


@dataclass(frozen=True)
class _Placement:
    across: Axis
    up: Axis
    log: bool

    def x(self, values: Values) -> Values:
        return np.rint((values - self.across.low) / (self.across.high - self.across.low) * SCALE)

    def y(self, values: Values) -> Values:
        heights = np.log10(values) if self.log else values
        shares = (heights - self.up.low) / (self.up.high - self.up.low)
        # Far outside of the plot nothing is seen, and browsers draw huge coordinates wrongly.
        return np.rint((1.0 - np.clip(shares, -1.0, 2.0)) * SCALE)


def _within(chart: Chart) -> Chart:
    """Return the chart with the points from x_from on."""
    if chart.x_from == -math.inf:
        return chart
    lines = []
    for line in chart.lines:
        series, kept = line.series, line.series.x >= chart.x_from
        x, y, smooth = series.x[kept], series.y[kept], series.smooth[kept]
        low, high = series.low[kept], series.high[kept]
        lines.append(replace(line, series=Series(x, y, low, high, smooth, int(kept.sum()), series.end)))
    return replace(chart, lines=lines, marks=[mark for mark in chart.marks if mark.x >= chart.x_from])


def _ends(lines: Sequence[Line]) -> list[float]:
    return [float(end) for line in lines for end in (line.series.x[0], line.series.end)]


def _vertical(chart: Chart, lines: Sequence[Line], ticks: int) -> Axis:
    values = np.concatenate([part for line in lines for part in (line.series.low, line.series.high)])
    if chart.log:
        values = np.log10(values)
    ends = np.quantile(values, (0.005, 0.995)) if chart.robust else np.array([values.min(), values.max()])
    # A mean of values near the largest number may overflow.
    ends = ends[np.isfinite(ends)].tolist() or [0.0, 1.0]
    return make_axis(ends, ticks)


def _vertical_labels(up: Axis, place: _Placement, chart: Chart) -> str:
    ticks = "".join(
        f"<span style='top:{place.y(np.array([_raw(tick, place)]))[0] / SCALE:.2%}'>{_tick(tick, up, chart)}</span>"
        for tick in up.ticks
    )
    return f"<div class='y'>{ticks}</div>"


def _raw(tick: float, place: _Placement) -> float:
    return 10.0**tick if place.log else tick


def _tick(tick: float, up: Axis, chart: Chart) -> str:
    if chart.log:
        return short(float(f"{10.0**tick:.2g}"))
    if chart.value == "percent":
        return f"{100 * tick:.3g}%"
    if chart.value == "power" and (not tick or abs(tick) < 0.01):
        mantissa, _, exponent = f"{tick:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if tick else "0"
    return up.label(tick) if abs(tick) < 1000 else short(tick)


def short(number: float) -> str:
    """Return a number with at most four digits and k, M, G or T.

    >>> short(0), short(250000), short(1.5e9), short(2e30)
    ('0', '250k', '1.5G', '2e+30')
    """
    if abs(number) >= 1e15:
        return f"{number:.3g}"
    for suffix in ("", "k", "M", "G"):
        if abs(number) < 999.95:
            return f"{number:.4g}{suffix}"
        number /= 1000.0
    return f"{number:.4g}T"


def _horizontal_labels(across: Axis, place: _Placement) -> str:
    ticks = "".join(
        f"<span style='left:{place.x(np.array([tick]))[0] / SCALE:.2%}'>{short(tick)}</span>" for tick in across.ticks
    )
    return f"<div class='x'>{ticks}</div>"


def _grid(up: Axis, place: _Placement) -> str:
    heights = place.y(np.array([_raw(tick, place) for tick in up.ticks]))
    return f"<path class='grid' d='{''.join(f'M0 {y:.0f}H{SCALE}' for y in heights)}'/>"


def _marks(marks: Sequence[Mark], place: _Placement) -> str:
    """Return vertical lines; of kinds with many marks, ticks at the top, which hide no curve."""
    counts = Counter(mark.kind for mark in marks)
    parts = []
    for mark, x in zip(marks, place.x(np.array([mark.x for mark in marks], dtype=np.float64)), strict=True):
        length = SCALE * 0.05 if counts[mark.kind] > MANY_MARKS else SCALE
        text = escape(mark.text, quote=True)
        parts.append(f"<path class='mark {mark.kind}' d='M{x:.0f} 0V{length:.0f}' data-text='{text}'/>")
    return "".join(parts)


def _line(line: Line, place: _Placement) -> str:
    series, name = line.series, escape(line.name, quote=True)
    x, colour = place.x(series.x), f"c{1 + (line.colour - 1) % COLOURS}"
    if line.style in ("points", "dashed"):
        dots = "".join(f"M{a:.0f} {b:.0f}h0" for a, b in zip(x, place.y(series.y), strict=True))
        # More markers would hide the other lines.
        dots = dots if line.style == "points" and len(series) <= 80 else ""
        return (
            f"<polyline class='dashed {colour}' data-name='{name}' points='{_points(x, place.y(series.y))}'/>"
            f"<path class='dots {colour}' d='{dots}'/>"
        )
    if len(series) == 1:
        return (
            f"<polyline class='{colour}' data-name='{name}' points='{_points(x, place.y(series.y))}'/>"
            f"<path class='dots {colour}' d='M{x[0]:.0f} {place.y(series.y)[0]:.0f}h0'/>"
        )
    if line.style == "plain":
        return f"<polyline class='{colour}' data-name='{name}' points='{_points(x, place.y(series.y))}'/>"
    behind = f"<polyline class='raw {colour}' points='{_points(x, place.y(series.y))}'/>"
    if series.count > len(series):
        outline = _points(np.append(x, x[::-1]), np.append(place.y(series.high), place.y(series.low)[::-1]))
        behind = f"<polygon class='band {colour}' points='{outline}'/>"
    return f"{behind}<polyline class='{colour}' data-name='{name}' points='{_points(x, place.y(series.smooth))}'/>"


def _points(x: Values, y: Values) -> str:
    return " ".join(f"{a:.0f},{b:.0f}" for a, b in zip(x, y, strict=True))


def _legend_entry(line: Line) -> str:
    kind = " dashed" if line.style in ("points", "dashed") else ""
    note = f" <b>{escape(line.note)}</b>" if line.note else ""
    return f"<li><i class='c{1 + (line.colour - 1) % COLOURS}{kind}'></i>{escape(line.name)}{note}</li>"


def _description(chart: Chart, lines: Sequence[Line]) -> str:
    names = ", ".join(f"{line.name} (last value {line.series.y[-1]:.5g})" for line in lines)
    return f"{chart.title} by {chart.x_name}: {names}"


def average_line(name: str, x: Values, y: Values, colour: int, note: str = "") -> Line | None:
    """Return the moving average of a series of any length; None: it has no point."""
    series = reduce_series(x, y)
    if not len(series):
        return None
    smooth = series.smooth
    return Line(name, replace(series, y=smooth, low=smooth, high=smooth), colour, "plain", note)


def line_of(name: str, x: Values, y: Values, colour: int, style: str = "smooth", note: str = "") -> Line:
    """Return the line of a series of any length."""
    return Line(name, reduce_series(x, y), colour, style, note)
