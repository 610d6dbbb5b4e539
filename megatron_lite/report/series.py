"""Series of a chart: values reduced to a few hundred buckets with mean, minimum and maximum, and smoothed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lite.metrics.curve import smooth

Values = NDArray[np.float64]
BUCKETS = 400
"""Points of a drawn line, about one for every two pixels of a wide screen."""


@dataclass(frozen=True)
class Series:
    """Points of a line; `low` and `high` bound the values of each bucket.

    Attributes:
        x: of the points, ascending.
        y: means of the buckets, or the values themselves if there are at most BUCKETS.
        smooth: moving average of y.
        count: number of values before the reduction.
        end: last x, also of a value that is not finite: the axis of a diverged run reaches its last iteration.
    """

    x: Values
    y: Values
    low: Values
    high: Values
    smooth: Values
    count: int
    end: float

    def __len__(self) -> int:
        return len(self.x)


def reduce_series(x: Values, y: Values) -> Series:
    """Return the finite points of a series, reduced to at most BUCKETS.

    Args:
        x: ascending [n].
        y: values [n]; those that are not finite are omitted.
    """
    end = float(np.max(x, initial=-np.inf, where=np.isfinite(x)))
    known = np.isfinite(y) & np.isfinite(x)
    x, y = x[known], y[known]
    count = len(x)
    if count <= BUCKETS:
        return Series(x, y, y, y, _smoothed(x, y), count, end)
    edges = np.unique(np.linspace(0, count, BUCKETS + 1).astype(np.int64))[:-1]
    sizes = np.diff(np.append(edges, count))
    means = np.add.reduceat(y, edges) / sizes
    low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    middles = np.add.reduceat(x, edges) / sizes
    # The ends of the run are drawn, not the middles of the outermost buckets.
    middles[0], middles[-1] = x[0], x[-1]
    return Series(middles, means, low, high, _smoothed(middles, means), count, end)


def _smoothed(x: Values, y: Values) -> Values:
    return np.array([value for _, value in smooth(list(zip(x.tolist(), y.tolist(), strict=True)))], dtype=np.float64)
