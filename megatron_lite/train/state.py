"""A run's state on its way to the disk: its saves, in the foreground or behind its back, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

from megatron_lite import __version__
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.catalog import iteration_of
from megatron_lite.checkpoint.manifest import Provenance
from megatron_lite.checkpoint.names import is_model_tensor
from megatron_lite.checkpoint.resume import config_as_json
from megatron_lite.checkpoint.retention import retention_of
from megatron_lite.checkpoint.save import SaveReport, save_checkpoint
from megatron_lite.config.run import RunConfig
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.engine import Engine
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
    """

    def __init__(self, config: RunConfig, world: Group, provenance: Provenance, start: Start, notify: Notify) -> None:
        self._options = config.checkpoint
        self._world = world
        self._provenance = provenance
        self._notify = notify
        self._saver = BackgroundSaver(world) if self._options.asynchronous else None
        own = start.path is not None and start.path.parent == Path(self._options.save)
        self._last_saved = iteration_of(start.path) if own and start.path is not None else None

    def __enter__(self) -> RunState:
        (self._saver or nullcontext()).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        (self._saver or nullcontext()).__exit__(kind, error, trace)

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
        scalars = {"progress": progress.to_dict(), "engine": engine.state_scalars()}
        root, retention = Path(self._options.save), retention_of(self._options)
        self._notify(f"saving checkpoint at iteration {progress.iteration:7d} to {root}")
        if self._saver is None:
            self._announce(
                save_checkpoint(
                    root, progress.iteration, tensors, scalars, self._provenance, self._world, retention=retention
                )
            )
            return
        self._announce(self._saver.wait())
        blocked = self._saver.save(root, progress.iteration, tensors, scalars, self._provenance, retention=retention)
        self._notify(f"  copied it in {blocked:.2f} s; it is written while training goes on")

    def finish(self) -> None:
        """Waits for the save under way, if there is one; a collective call.

        Raises:
            CheckpointError: it failed.
        """
        if self._saver is not None:
            self._announce(self._saver.wait())

    def _announce(self, report: SaveReport | None) -> None:
        if report is None:
            return
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
