"""Best validation: lowest validation loss of a run, and early stopping when it no longer falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class BestValidation:
    """Lowest validation loss so far. Its state is saved, so that a resumed run stops at the same evaluation.

    Attributes:
        patience: evaluations in a row without improvement after which the run ends; 0: no early stopping.
        threshold: an evaluation improves if its loss is lower by more than this.
        loss: the lowest loss; infinite before the first evaluation.
        iteration: of the lowest loss; 0: there is none.
    """

    patience: int = 0
    threshold: float = 0.0
    loss: float = math.inf
    iteration: int = 0
    _reference: float = math.inf
    _without: int = 0
    _last: int = -1

    def observe(self, iteration: int, loss: float) -> bool:
        """Add an evaluation, and return whether its loss is the lowest so far.

        The evaluation at the end of a run may be the second at its iteration: it is ignored.
        """
        if self.has_observed(iteration):
            return False
        self._last = iteration
        improves = loss < self._reference - self.threshold
        self._without = 0 if improves else self._without + 1
        if improves:
            self._reference = loss
        if not loss < self.loss:
            return False
        self.loss, self.iteration = loss, iteration
        return True

    def has_observed(self, iteration: int) -> bool:
        """Return whether the last evaluation was that of an iteration."""
        return iteration == self._last

    @property
    def exhausted(self) -> bool:
        """Return whether the run ends early: as many evaluations without improvement as --early-stopping-patience."""
        return 0 < self.patience <= self._without

    def describe(self) -> str:
        """Return the log line of an early stop."""
        return (
            f"training stopped early at iteration {self._last}: the validation loss has not improved in "
            f"{self._without} evaluations (--early-stopping-patience {self.patience}); it was lowest, {self.loss:.6E}, "
            f"at iteration {self.iteration}"
        )

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "loss": _finite(self.loss),
            "iteration": self.iteration,
            "reference": _finite(self._reference),
            "without": self._without,
            "last": self._last,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.loss = math.inf if state["loss"] is None else state["loss"]
        self.iteration = state["iteration"]
        self._reference = math.inf if state["reference"] is None else state["reference"]
        self._without, self._last = state["without"], state["last"]


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
