"""Checkpoint saving of a run: scheduled saves, synchronous or asynchronous, with retention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lite.backend.agreement import broadcast_from_rank0
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.names import EMA_PREFIX, OPTIMIZER_PREFIX, is_model_tensor
from megatron_lite.checkpoint.save import save_checkpoint
from megatron_lite.checkpoint.writing import SaveReport, SaveRequest
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_size
from megatron_lite.lifecycle.best import BestValidation
from megatron_lite.lifecycle.spikes import SpikeDetector
from megatron_lite.metrics.report import SaveRecord
from megatron_lite.metrics.reporter import Reporter
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.runs.catalog import best_iteration, is_complete, iteration_of, locate, read_latest, set_best
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.manifest import Provenance
from megatron_lite.runs.retention import KEEP_ALL, Retention, retention_of
from megatron_lite.runs.rollback import WEIGHTS_FOLDER
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.saves import is_save_iteration, is_weights_iteration
from megatron_lite.system_errors import reason, remedy
from megatron_lite.train.engine import Engine
from megatron_lite.train.start import Start


@dataclass
class _SaveTarget:
    """Saves to one folder: synchronous, or one at a time in the background.

    Attributes:
        last: iteration of the newest save: complete, under way or failed.
    """

    root: Path
    saver: BackgroundSaver | None
    last: int | None = None


class RunState:
    """Saves the run, synchronously or in the background. A context manager that waits for the last save on exit.

    Args:
        config: the run's.
        world: all ranks.
        provenance: config and fingerprints of the run, for the manifests.
        start: its start point; a save of that same state is omitted.
        reporter: receives a line and a record about each save.
        earlier_save: seconds of the slowest save of earlier jobs of the run; 0: none is known.
        lock: of the --save folder, on the rank that holds it; None: it is not verified.

    Attributes:
        provenance: as given.
        spikes: detects loss spikes; its state is saved with the rest.
        best: lowest validation loss, saved likewise.
        longest_save: seconds of the slowest save so far, as an estimate of the next; 0: none is known.
        failed_saves: iterations whose saves failed.
    """

    def __init__(
        self,
        config: RunConfig,
        world: Group,
        provenance: Provenance,
        start: Start,
        reporter: Reporter,
        *,
        earlier_save: float = 0.0,
        lock: FolderLock | None = None,
    ) -> None:
        self.provenance = provenance
        self.spikes = SpikeDetector(config.training.spike_factor, config.training.spike_patience)
        self.best = BestValidation(config.tuning.patience, config.tuning.patience_threshold)
        self.longest_save = earlier_save
        self.failed_saves: list[int] = []
        self._options = config.checkpoint
        self._unsaved_best: int | None = None
        self._world = world
        self._reporter = reporter
        self._notify = reporter.message
        self._lock = lock
        root = Path(self._options.save)
        own = start.path is not None and start.path.parent == root
        begun = iteration_of(start.path) if own and start.path is not None else None
        self._full = _SaveTarget(root, self._new_saver(), begun)
        self._weights = _SaveTarget(root / WEIGHTS_FOLDER, self._new_saver())

    def __enter__(self) -> RunState:
        for saver in self._savers:
            saver.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish(final=True)
        for saver in self._savers:
            saver.__exit__(kind, error, trace)

    @property
    def failed(self) -> bool:
        """Return True if a background save has failed on this rank; `finish`, on all ranks, then reports it."""
        return any(saver.failed for saver in self._savers)

    @property
    def seconds_to_save(self) -> float | None:
        """Return the seconds that a save now takes, after the one in progress; 0: unknown; None: there is no --save."""
        if not self._options.save:
            return None
        return self.longest_save * (1 + any(saver.in_progress for saver in self._savers))

    def check_lock(self, *, now: bool = False) -> None:
        """Verify, on the rank that holds the folder's lock, that it still does; cheap unless `now`.

        Raises:
            CheckpointError: the lock was lost. Raised on one rank, it ends the others by the heartbeat thread.
        """
        if self._lock is not None:
            self._lock.verify(now=now)

    def load(self, scalars: Mapping[str, Any]) -> None:
        """Restore the state of spikes and best validation from a checkpoint; a collective call."""
        if "spikes" in scalars:
            self.spikes.load(scalars["spikes"])
        if "best" in scalars:
            self.best.load(scalars["best"])
        root, iteration = self._full.root, self.best.iteration
        # A rollback removes the record of a later checkpoint.
        if iteration and self._full.last is not None and self._options.save_best:
            recorded = broadcast_from_rank0(self._world, lambda: best_iteration(root))
            if recorded != iteration and broadcast_from_rank0(
                self._world, lambda: is_complete(locate(root, iteration))
            ):
                self._record_best(iteration)

    def validated(self, iteration: int, loss: float) -> None:
        """Record the mean loss of a validation, whose checkpoint is the best if the loss is the lowest so far.

        The checkpoint is saved next, or was saved before the validation. A collective call with equal arguments.
        """
        if not self.best.observe(iteration, loss) or not self._options.save_best:
            return
        if self._full.last != iteration:
            self._unsaved_best = iteration
            return
        self.finish()
        if iteration not in self.failed_saves:
            self._record_best(iteration)
            self._notify(f"  the checkpoint of iteration {iteration} has the lowest validation loss so far, {loss:.6E}")

    def is_due(self, progress: Progress) -> bool:
        """Return whether the schedule requires a save after an iteration."""
        options, iteration = self._options, progress.iteration
        return bool(options.save) and (
            is_save_iteration(options, iteration) or is_weights_iteration(options, iteration)
        )

    def save_if_due(self, engine: Engine, progress: Progress, *, last: bool) -> None:
        """Save after an iteration, if the schedule or the end of the job requires it; a collective call.

        Args:
            engine: holds the state.
            progress: the engine's.
            last: it is the last iteration of the job.

        Raises:
            CheckpointError: as save.
        """
        options = self._options
        is_best = self._unsaved_best == progress.iteration
        if is_best or is_save_iteration(options, progress.iteration) or (last and options.save_on_exit):
            self.save(engine, progress, final=last)
        if options.save and is_weights_iteration(options, progress.iteration):
            self._save_weights(engine, progress, final=last)

    def save(self, engine: Engine, progress: Progress, *, final: bool) -> None:
        """Save, unless there is no --save or this iteration has been saved already; a collective call.

        Args:
            engine: holds the state.
            progress: the engine's.
            final: the job ends with it, so that its failure is an error even under --on-failed-save continue.

        Raises:
            CheckpointError: this save, or the one before it in the background, failed.
        """
        target = self._full
        if not self._options.save or target.last == progress.iteration:
            return
        tensors = engine.state_tensors()
        if not self._options.save_optimizer:
            tensors = [t for t in tensors if is_model_tensor(t.name) or t.name.startswith(EMA_PREFIX)]
        self._settle(target, final=False)
        which = ", with the lowest validation loss so far" if self._unsaved_best == progress.iteration else ""
        self._notify(f"saving checkpoint at iteration {progress.iteration:7d} to {target.root}{which}")
        retention = retention_of(self._options, self.spikes.ranges())
        self._write(target, engine, progress, tensors, retention, final=final)

    def finish(self, *, final: bool = False) -> None:
        """Wait for the saves under way, if there are any; a collective call.

        Raises:
            CheckpointError: one failed, and --on-failed-save is stop.
        """
        for target in (self._full, self._weights):
            self._settle(target, final=final)

    @property
    def _savers(self) -> Sequence[BackgroundSaver]:
        return [target.saver for target in (self._full, self._weights) if target.saver is not None]

    def _new_saver(self) -> BackgroundSaver | None:
        return BackgroundSaver(self._world) if self._options.asynchronous else None

    def _record_best(self, iteration: int) -> None:
        """Record a saved checkpoint as the best; a collective call."""
        root = self._full.root

        def record() -> None:
            self.check_lock(now=True)
            try:
                set_best(root, iteration)
            except OSError as error:
                raise CheckpointError(
                    f"Cannot record the best checkpoint in {root}: {reason(error)}",
                    fix=remedy(error, root, writing=True),
                ) from error

        broadcast_from_rank0(self._world, record)

    def _save_weights(self, engine: Engine, progress: Progress, *, final: bool) -> None:
        """Save the model's weights, and their moving average, without the optimizer's state."""
        tensors = [tensor for tensor in engine.state_tensors() if not tensor.name.startswith(OPTIMIZER_PREFIX)]
        self._settle(self._weights, final=False)
        self._notify(f"saving the weights at iteration {progress.iteration:7d} to {self._weights.root}")
        self._write(self._weights, engine, progress, tensors, KEEP_ALL, final=final)

    def _write(
        self,
        target: _SaveTarget,
        engine: Engine,
        progress: Progress,
        tensors: Sequence[GlobalTensor],
        retention: Retention,
        *,
        final: bool,
    ) -> None:
        scalars = {"progress": progress.to_dict(), "engine": engine.state_scalars()}
        scalars |= {"spikes": self.spikes.state(), "best": self.best.state()}
        check = partial(self.check_lock, now=True)
        best = target is self._full and self._unsaved_best == progress.iteration
        request = SaveRequest(target.root, progress.iteration, scalars, self.provenance, retention, check, best)
        target.last = progress.iteration
        with self._handling_failure(target, final=final):
            if target.saver is None:
                self._report(save_checkpoint(request, tensors, self._world))
            else:
                blocked = target.saver.save(request, tensors)
                self._notify(f"  copied in {blocked:.2f} s; written in the background")

    def _settle(self, target: _SaveTarget, *, final: bool) -> None:
        """Wait for the target's save under way, if there is one."""
        if target.saver is not None:
            with self._handling_failure(target, final=final):
                self._report(target.saver.wait())

    @contextmanager
    def _handling_failure(self, target: _SaveTarget, *, final: bool) -> Iterator[None]:
        """Turn a failure of the target's last save, which all ranks raise, into an error or a warning."""
        try:
            yield
        except CheckpointError as error:
            newest = read_latest(self._full.root)
            assert target.last is not None, "a save that fails has begun"
            self.failed_saves.append(target.last)
            left = (
                f"the newest complete checkpoint is of iteration {newest}" if newest else "there is no checkpoint yet"
            )
            if final or self._options.on_failed_save == "stop":
                hint = (
                    ""
                    if final
                    else ". With --on-failed-save continue, training continues and saves again at the next interval"
                )
                raise CheckpointError(f"{error.problem} ({left})", rule=error.rule, fix=f"{error.fix}{hint}") from error
            self._notify(
                f"WARNING: the save of iteration {target.last} to {target.root} FAILED, and training continues "
                "without it "
                f"(--on-failed-save continue); {left}. {error}"
            )

    def _report(self, report: SaveReport | None) -> None:
        if report is None:
            return
        self.longest_save = max(self.longest_save, report.seconds)
        iteration = iteration_of(report.path)
        assert iteration is not None, f"{report.path} is no checkpoint"
        self._reporter.saved(SaveRecord(iteration, report.seconds, report.size, report.blocking_seconds))
        self._notify(
            f"  successfully saved checkpoint at iteration {iteration:7d} to {report.path.parent} "
            f"({format_size(report.size)} in {report.seconds:.2f} s, training paused for "
            f"{report.blocking_seconds:.2f} s)"
        )
        if report.removed:
            self._notify(f"  removed {', '.join(report.removed)}")
        if report.problem:
            self._notify(f"WARNING: {report.problem}")
