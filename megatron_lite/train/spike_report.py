"""Loss-spike response: warning, kept checkpoints and automatic rollback target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.lifecycle.spikes import Spike
from megatron_lite.lifecycle.stopping import Stop
from megatron_lite.runs.catalog import folder_name, iteration_of, list_checkpoints
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.runs.rollback import automatic_rollbacks
from megatron_lite.schedules.iteration import IterationPlan
from megatron_lite.schedules.skipping import place_of

if TYPE_CHECKING:
    from megatron_lite.train.loop import Run

_SHOWN = 64


@dataclass(frozen=True)
class GoingBack:
    """A checkpoint's iteration to go back to, and the places [first, end) in the data to leave out from there."""

    iteration: int
    skip: tuple[int, int]


@dataclass(frozen=True)
class _Before:
    """The last checkpoint before a spike: its iteration, the place in the data that it reached, rollbacks so far."""

    iteration: int
    reached: int
    rollbacks: int


def notice(run: Run, plan: IterationPlan, loss: float) -> Stop | None:
    """Looks at an iteration's loss, tells of a spike, and says whether the run stops to go back; a collective call.

    If it does, run.going_back says where to.
    """
    spike = run.state.watch.observe(plan.iteration, loss, plan.first_sample, plan.global_batch)
    return None if spike is None else _tell(run, spike)


def way_out(run: Run, plan: IterationPlan, loss: float) -> Stop | None:
    """The same for a loss or gradient that is not finite; None: the run cannot go on; a collective call."""
    if not run.config.training.auto_rollback:
        return None
    return _tell(run, run.state.watch.broken(plan.iteration, loss, plan.first_sample, plan.global_batch))


def _tell(run: Run, spike: Spike) -> Stop | None:
    save = run.config.checkpoint.save
    run.state.finish()
    before: _Before | None = run.mesh.world.all_gather_object(
        _before(Path(save), spike) if save and run.mesh.world.rank == 0 else None
    )[0]
    run.reporter.message(_describe(run, spike))
    if before is None:
        run.reporter.message("  there is no checkpoint from before it to go back to")
        return None
    back = _way_back(run, spike, before)
    allowed = run.config.training.auto_rollback
    if back.skip[0] < back.skip[1] and before.rollbacks < allowed:
        run.going_back = back
        return Stop(
            "rollback",
            f"going back to iteration {back.iteration}, leaving out samples {back.skip[0]} to {back.skip[1] - 1} "
            f"(rollback {before.rollbacks + 1} of at most {allowed})",
        )
    why = f"; the {allowed} rollbacks of --auto-rollback are used up" if allowed else ""
    run.reporter.message(
        f"  {folder_name(before.iteration)} from before it is kept, and so is the first after it{why}. To go back: "
        f"megatron-lite rollback {save} --to {back.iteration} --skip-samples {back.skip[0]}-{back.skip[1] - 1}"
    )
    return None


def _before(root: Path, spike: Spike) -> _Before | None:
    earlier = [path for path in list_checkpoints(root) if (iteration_of(path) or 0) < spike.first]
    if not earlier:
        return None
    manifest = read_manifest(earlier[-1])
    consumed = manifest.scalars["progress"]["consumed_train_samples"]
    reached = place_of(consumed, manifest.provenance.skipped_samples)
    return _Before(manifest.iteration, reached, automatic_rollbacks(root))


def _way_back(run: Run, spike: Spike, before: _Before) -> GoingBack:
    places = _places(run, spike)
    return GoingBack(before.iteration, (max(places[0], before.reached), places[-1] + 1))


def _places(run: Run, spike: Spike) -> list[int]:
    assert run.data.train is not None
    first, end = spike.consumed
    return run.data.train.positions(first, end - first)


def _describe(run: Run, spike: Spike) -> str:
    assert run.data.train is not None
    first, end = spike.consumed
    places, numbers = _places(run, spike), run.data.train.list_samples(first, end - first, _SHOWN)
    return (
        f"WARNING: loss spike: in iterations {spike.first} to {spike.last} the loss is up to {spike.loss:.6E}, and "
        f"{spike.usual:.6E} is usual. From the iteration before it on, the run trained on samples {places[0]} to "
        f"{places[-1]} (numbers {numbers} of the training data)"
    )
