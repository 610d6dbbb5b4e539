"""Loss-spike detection: compares each loss with the median of recent losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WINDOW = 64
"""Losses that the usual one is the median of; and iterations after which a higher loss is taken for the usual one."""
FEWEST = 8
"""Losses that it takes to know what is usual."""


@dataclass(frozen=True)
class Spike:
    """A spike at the iteration where it becomes certain.

    Attributes:
        first: the first iteration with too high a loss.
        last: the iteration that makes it certain.
        loss: the highest loss among them.
        usual: the median of the losses before.
        consumed: samples consumed before the last iteration whose step came before the high loss, and up to `last`.
    """

    first: int
    last: int
    loss: float
    usual: float
    consumed: tuple[int, int]


@dataclass
class SpikeWatch:
    """Looks at one loss after the other. Its state is saved, so that a resumed run sees what an uninterrupted one does.

    Attributes:
        factor: a loss above this many times the median of recent ones is too high; 0: none is.
        patience: how many of them in a row are a spike.
    """

    factor: float
    patience: int
    _recent: list[float] = field(default_factory=list)
    _first: int | None = None
    _count: int = 0
    _highest: float = 0.0
    _begins: int = 0
    _before: int = 0
    _spikes: list[tuple[int, int]] = field(default_factory=list)

    def observe(self, iteration: int, loss: float, consumed: int, batch: int) -> Spike | None:
        """Takes the next loss, and returns the spike that it makes certain.

        Args:
            iteration: its number, from 1.
            loss: of this iteration, before its step.
            consumed: samples consumed before it.
            batch: samples of it.
        """
        if not self.factor:
            return None
        usual = median(self._recent) if len(self._recent) >= FEWEST else math.inf
        # Not `loss > …`: a loss that is not a number is too high as well.
        if usual == math.inf or loss <= self.factor * usual:
            self._end(iteration)
            if math.isfinite(loss):
                self._recent = [*self._recent[-WINDOW + 1 :], loss]
            self._before = batch
            return None
        if self._first is None:
            # The step before this loss is the one that broke it.
            self._first, self._begins, self._highest = iteration, max(0, consumed - self._before), loss
        self._count += 1
        self._highest = max(self._highest, loss)
        if self._count == WINDOW:
            self._end(iteration + 1)
            self._recent = []
        elif self._count == self.patience:
            return Spike(self._first, iteration, self._highest, usual, (self._begins, consumed + batch))
        return None

    def broken(self, iteration: int, loss: float, consumed: int, batch: int) -> Spike:
        """What a loss or gradient that is not finite makes certain at once. Arguments as of observe."""
        rising = self._first is not None
        return Spike(
            first=self._first if self._first is not None else iteration,
            last=iteration,
            loss=loss,
            usual=median(self._recent) if self._recent else math.nan,
            consumed=(self._begins if rising else max(0, consumed - self._before), consumed + batch),
        )

    def around(self) -> tuple[tuple[int, int | None], ...]:
        """(first, last) iteration of each spike so far, for Retention: what may become one has no last."""
        going_on = () if self._first is None else ((self._first, None),)
        return (*self._spikes, *going_on)

    def state(self) -> dict[str, Any]:
        """All that it has seen, as JSON values."""
        return {
            "recent": list(self._recent),
            "first": self._first,
            "count": self._count,
            "highest": self._highest if math.isfinite(self._highest) else None,
            "begins": self._begins,
            "before": self._before,
            "spikes": [list(spike) for spike in self._spikes],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over the result of state."""
        self._recent, self._first, self._count = list(state["recent"]), state["first"], state["count"]
        self._highest = math.nan if state["highest"] is None else state["highest"]
        self._begins, self._before = state["begins"], state["before"]
        self._spikes = [(first, last) for first, last in state["spikes"]]

    def _end(self, iteration: int) -> None:
        if self._first is not None and self._count >= self.patience:
            self._spikes.append((self._first, iteration - 1))
        self._first, self._count = None, 0
