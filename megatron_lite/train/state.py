"""A run's state on its way to the disk: its saves, in the foreground or behind its back, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from megatron_lite import __version__
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.catalog import iteration_of
from megatron_lite.checkpoint.manifest import Provenance
from megatron_lite.checkpoint.names import OPTIMIZER_PREFIX, is_model_tensor
from megatron_lite.checkpoint.resume import config_as_json
from megatron_lite.checkpoint.retention import KEEP_ALL, Retention, retention_of
from megatron_lite.checkpoint.rollback import WEIGHTS_FOLDER
from megatron_lite.checkpoint.save import SaveReport, save_checkpoint
from megatron_lite.config.run import RunConfig
from megatron_lite.parallel.tensors import GlobalTensor
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.saves import is_save_iteration, is_weights_iteration
from megatron_lite.train.engine import Engine
from megatron_lite.train.spikes import SpikeWatch
from megatron_lite.train.start import Start

Notify = Callable[[str], None]


class RunState:
    """Saves the run, in the foreground or behind its back. A context manager: leaving it waits for the last save.

    Args:
        config: its checkpoint part says where and how.
        world: all ranks.
        provenance: what every manifest says about the run.
        start: what it started from; a save of that very state is left out.
        notify: told of each save.

    Attributes:
        provenance: as given.
        watch: what has been seen of the loss; it is saved with the rest.
        longest_save: seconds of the slowest save so far, which the next may take as well; 0 if there was none here.
    """

    def __init__(self, config: RunConfig, world: Group, provenance: Provenance, start: Start, notify: Notify) -> None:
        self.watch = SpikeWatch(config.training.spike_factor, config.training.spike_patience)
        self.longest_save = 0.0
        self._options = config.checkpoint
        self._world = world
        self.provenance = provenance
        self._notify = notify
        self._saver = BackgroundSaver(world) if self._options.asynchronous else None
        self._weights_saver = BackgroundSaver(world) if self._options.asynchronous else None
        own = start.path is not None and start.path.parent == Path(self._options.save)
        self._last_saved = iteration_of(start.path) if own and start.path is not None else None

    def __enter__(self) -> RunState:
        for saver in self._savers:
            saver.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        for saver in self._savers:
            saver.__exit__(kind, error, trace)

    def save_if_due(self, engine: Engine, progress: Progress, *, stopping: bool) -> None:
        """After an iteration: saves what the flags ask for; a collective call.

        Args:
            engine: whose state it is.
            progress: what it has reached.
            stopping: whether the run stops early now.

        Raises:
            CheckpointError: as save.
        """
        options = self._options
        if options.save and is_weights_iteration(options, progress.iteration):
            self._save_weights(engine, progress)
        if is_save_iteration(options, progress.iteration) or (stopping and options.save_on_exit):
            self.save(engine, progress)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Saves, unless there is no --save or this iteration is on the disk already; a collective call.

        Raises:
            CheckpointError: this save, or the one before it in the background, failed.
        """
        if not self._options.save or self._last_saved == progress.iteration:
            return
        self._last_saved = progress.iteration
        tensors = engine.state_tensors()
        if not self._options.save_optimizer:
            tensors = [tensor for tensor in tensors if is_model_tensor(tensor.name)]
        root = Path(self._options.save)
        self._notify(f"saving checkpoint at iteration {progress.iteration:7d} to {root}")
        self._write(root, engine, progress, tensors, self._saver, retention_of(self._options, self.watch.around()))

    def finish(self) -> None:
        """Waits for the saves under way, if there are any; a collective call.

        Raises:
            CheckpointError: one failed.
        """
        for saver in self._savers:
            self._announce(saver.wait())

    @property
    def _savers(self) -> Sequence[BackgroundSaver]:
        return [saver for saver in (self._saver, self._weights_saver) if saver is not None]

    def _save_weights(self, engine: Engine, progress: Progress) -> None:
        """The weights as the model computes with them, without what only training needs."""
        tensors = [tensor for tensor in engine.state_tensors() if not tensor.name.startswith(OPTIMIZER_PREFIX)]
        root = Path(self._options.save) / WEIGHTS_FOLDER
        self._notify(f"saving the weights at iteration {progress.iteration:7d} to {root}")
        self._write(root, engine, progress, tensors, self._weights_saver, KEEP_ALL)

    def _write(
        self,
        root: Path,
        engine: Engine,
        progress: Progress,
        tensors: Sequence[GlobalTensor],
        saver: BackgroundSaver | None,
        retention: Retention,
    ) -> None:
        scalars = {"progress": progress.to_dict(), "engine": engine.state_scalars(), "spikes": self.watch.state()}
        state = (root, progress.iteration, tensors, scalars, self.provenance)
        if saver is None:
            self._announce(save_checkpoint(*state, self._world, retention=retention))
            return
        self._announce(saver.wait())
        blocked = saver.save(*state, retention=retention)
        self._notify(f"  copied it in {blocked:.2f} s; it is written while training goes on")

    def _announce(self, report: SaveReport | None) -> None:
        if report is None:
            return
        self.longest_save = max(self.longest_save, report.seconds)
        iteration, size = iteration_of(report.path), report.size / 2**20
        self._notify(
            f"  successfully saved checkpoint at iteration {iteration:7d} to {report.path.parent} "
            f"({size:.1f} MiB in {report.seconds:.2f} s)"
        )
        if report.removed:
            self._notify(f"  removed {', '.join(report.removed)}")


def provenance_of(config: RunConfig, fingerprints: dict[str, str]) -> Provenance:
    """What a manifest says about a run: its whole config, and what it depends on besides."""
    return Provenance(
        config=config_as_json(config), fingerprints={**fingerprints, "code": f"megatron_lite {__version__}"}
    )
