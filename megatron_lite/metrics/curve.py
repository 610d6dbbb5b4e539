"""Loss-curve data from metrics.jsonl: series, smoothing and axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_lite.errors import DataError
from megatron_lite.formatting import format_parameters
from megatron_lite.runs.metrics_file import loss_point, read_records

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class LossCurve:
    """Loss series of a run; points are (iteration, loss), ascending and finite."""

    title: str
    train: tuple[tuple[float, float], ...]
    validation: dict[str, tuple[tuple[float, float], ...]]
    """Series by dataset name; "validation" for a single dataset."""
    quantity: str = "lm loss"
    """Name of the values, for the vertical axis."""

    @property
    def series(self) -> list[Points]:
        """Return every non-empty series."""
        return [points for points in (self.train, *self.validation.values()) if points]


def read_curve(path: Path, title: str = "") -> LossCurve:
    """Read the loss curve from a metrics.jsonl.

    Raises:
        DataError: the file is missing, damaged, or holds no finite loss.
    """
    train: list[tuple[float, float]] = []
    validation: dict[str, list[tuple[float, float]]] = {}
    parameters = 0
    for record in read_records(path):
        parameters = record.get("parameters", parameters)
        if (point := loss_point(record)) is not None:
            series, *place = point
            (validation.setdefault(series, []) if series else train).append((place[0], place[1]))
    if not train and not validation:
        raise DataError(
            f"The metrics file {path} contains no finite loss",
            fix="Wait until the run has logged an iteration; if its losses are NaN, give the metrics.jsonl of another "
            "run",
        )
    title = title or ("Loss" if not parameters else f"Loss of a GPT with {format_parameters(parameters)} parameters")
    return LossCurve(title, tuple(train), {name: tuple(points) for name, points in validation.items()})


def smooth(points: Points) -> list[tuple[float, float]]:
    """Return centered moving averages over 2% of the run; the window is narrower near both ends, to avoid a lag."""
    reach = len(points) // 100
    sums = [0.0, *accumulate(y for _, y in points)]
    smoothed = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        smoothed.append((x, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return smoothed


def final_loss(points: Points) -> float:
    """Return the mean of the last 2% of the points, since the loss of one iteration is noisy."""
    last = points[-max(1, len(points) // 50) :]
    return sum(y for _, y in last) / len(last)


def thin(points: Points, limit: int) -> list[tuple[float, float]]:
    """Return about `limit` points of the same appearance: the minimum and maximum of each stretch."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(2 * len(points) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


@dataclass(frozen=True)
class Axis:
    """Axis range with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return the position of `value` between low (0) and high (1)."""
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        """Return the text of a tick, with as many decimals as distinguish neighbouring ticks."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{tick:,.{decimals}f}" if abs(tick) >= 10000 else f"{tick:.{decimals}f}"


def make_axis(values: Sequence[float], count: int, *, whole: bool = False) -> Axis:
    """Return an axis over `values` with about `count` ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        values: at least one finite number.
        count: desired number of ticks, raised to at least 3: round steps are up to 2.5 times the desired length, and at
            least one tick is needed.
        whole: use whole numbers as ticks, and no margin around the values (iterations).
    """
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        reach = 1.0 if whole else max(abs(high) * 0.05, 1e-3)
        low, high = low - reach, high + reach
    elif not whole:
        low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    step = _round_step((high - low) / max(3, count))
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(number * step for number in range(first, last + 1)))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1.0 - 1e-9))
