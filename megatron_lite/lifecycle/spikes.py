"""Loss spikes: detection against the median of recent losses, warning, automatic rollback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_lite.config.run import RunConfig
from megatron_lite.lifecycle.stopping import Rollback, Stop
from megatron_lite.runs.catalog import folder_name, iteration_of, list_checkpoints
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.runs.rollback import automatic_rollbacks
from megatron_lite.schedules.skipping import place_of

if TYPE_CHECKING:
    from megatron_lite.backend.group import Group
    from megatron_lite.data.serving.loader import Loader
    from megatron_lite.metrics.reporter import Reporter

WINDOW = 64
"""Number of recent losses in the median; after as many iterations of a higher loss, that loss is the new normal."""
MIN_LOSSES = 8
"""Number of losses before which no spike is detected."""
_SHOWN = 64
"""Sample numbers that the warning lists."""


@dataclass(frozen=True)
class Spike:
    """A loss spike at the iteration that confirms it.

    Attributes:
        first: the first iteration with too high a loss.
        last: the iteration that confirms the spike.
        loss: the highest of these losses.
        usual: the median of the losses before.
        consumed: samples consumed before the step that preceded the high loss, and up to `last`.
    """

    first: int
    last: int
    loss: float
    usual: float
    consumed: tuple[int, int]


@dataclass
class SpikeDetector:
    """Detects spikes in a sequence of losses. Its state is saved, so that a resumed run detects the same ones.

    Attributes:
        factor: a loss above this many times the median of recent ones is too high; 0: no detection.
        patience: number of consecutive high losses that make a spike.
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
        """Add the next loss, and return the spike that it confirms.

        Args:
            iteration: its number, from 1.
            loss: of this iteration, before its step.
            consumed: samples consumed before it.
            batch: number of samples in it.
        """
        if not self.factor:
            return None
        usual = median(self._recent) if len(self._recent) >= MIN_LOSSES else math.inf
        # Not `loss > factor * usual`: NaN must count as too high.
        if usual == math.inf or loss <= self.factor * usual:
            self._end(iteration)
            if math.isfinite(loss):
                self._recent = [*self._recent[-WINDOW + 1 :], loss]
            self._before = batch
            return None
        if self._first is None:
            # The step before this loss may be the one that caused it.
            self._first, self._begins, self._highest = iteration, max(0, consumed - self._before), loss
        self._count += 1
        self._highest = max(self._highest, loss)
        if self._count == WINDOW:
            self._end(iteration + 1)
            self._recent = []
        elif self._count == self.patience:
            return Spike(self._first, iteration, self._highest, usual, (self._begins, consumed + batch))
        return None

    def not_finite(self, iteration: int, loss: float, consumed: int, batch: int) -> Spike:
        """Return the spike that a loss or gradient that is not finite confirms at once. Arguments as for observe."""
        rising = self._first is not None
        return Spike(
            first=self._first if self._first is not None else iteration,
            last=iteration,
            loss=loss,
            usual=median(self._recent) if self._recent else math.nan,
            consumed=(self._begins if rising else max(0, consumed - self._before), consumed + batch),
        )

    def ranges(self) -> tuple[tuple[int, int | None], ...]:
        """Return (first, last) iteration of each spike so far, for Retention; last is None while the loss is high."""
        current = () if self._first is None else ((self._first, None),)
        return (*self._spikes, *current)

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values."""
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
        """Restore the result of `state`."""
        self._recent, self._first, self._count = list(state["recent"]), state["first"], state["count"]
        self._highest = math.nan if state["highest"] is None else state["highest"]
        self._begins, self._before = state["begins"], state["before"]
        self._spikes = [(first, last) for first, last in state["spikes"]]

    def _end(self, iteration: int) -> None:
        if self._first is not None and self._count >= self.patience:
            self._spikes.append((self._first, iteration - 1))
        self._first, self._count = None, 0


def respond_to_spike(spike: Spike, config: RunConfig, world: Group, data: Loader, reporter: Reporter) -> Stop | None:
    """Warn of a spike, and decide whether the run stops to roll back; a collective call.

    Args:
        spike: the spike.
        config: the run's.
        world: all ranks.
        data: the training data.
        reporter: prints the warning, with the command for a manual rollback if there is no automatic one.

    Returns:
        The stop with the rollback to perform; None: training continues.
    """
    begin, end = spike.consumed
    positions = data.positions(begin, end - begin)
    reporter.message(
        f"WARNING: loss spike: the loss rose to {spike.loss:.6E} in iterations {spike.first} to {spike.last}, from a "
        f"median of {spike.usual:.6E}. Since the step before it the run trained on samples {positions[0]} to "
        f"{positions[-1]} (numbers {data.list_samples(begin, end - begin, _SHOWN)} of the training data)"
    )
    save, allowed = config.checkpoint.save, config.training.auto_rollback
    # Rank 0's view of the folder counts: network file systems may show others an older one.
    found: tuple[int, int, int] | None = world.all_gather_object(
        _checkpoint_before(Path(save), spike) if save and world.rank == 0 else None
    )[0]
    if found is None:
        reporter.message("  there is no checkpoint from before the spike")
        return None
    iteration, reached, rollbacks = found
    first, last = max(positions[0], reached), positions[-1]
    if first <= last and rollbacks < allowed:
        message = (
            f"rolling back to iteration {iteration}, skipping samples {first} to {last} (rollback {rollbacks + 1} "
        )
        return Stop("rollback", f"{message}of at most {allowed})", rollback=Rollback(iteration, (first, last + 1)))
    used_up = f"; the {allowed} rollbacks of --auto-rollback are used up" if allowed else ""
    reporter.message(
        f"  {folder_name(iteration)} from before the spike and the first checkpoint after it are kept{used_up}. "
        f"To roll back: megatron-lite rollback {save} --to {iteration} --skip-samples {first}-{last}"
    )
    return None


def _checkpoint_before(root: Path, spike: Spike) -> tuple[int, int, int] | None:
    """Return iteration and reached data position of the last checkpoint before a spike, and the rollbacks so far."""
    earlier = [path for path in list_checkpoints(root) if (iteration_of(path) or 0) < spike.first]
    if not earlier:
        return None
    manifest = read_manifest(earlier[-1])
    consumed = manifest.scalars["progress"]["consumed_train_samples"]
    reached = place_of(consumed, manifest.provenance.skipped_samples)
    return manifest.iteration, reached, automatic_rollbacks(root)
