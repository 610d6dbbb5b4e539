"""A run's state on disk: which checkpoint it starts from, whether that one belongs to it, and its saves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_lite import __version__
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.background import BackgroundSaver
from megatron_lite.checkpoint.catalog import find_checkpoint, iteration_of, list_checkpoints
from megatron_lite.checkpoint.load import load_latest
from megatron_lite.checkpoint.manifest import Manifest, Provenance, read_manifest
from megatron_lite.checkpoint.names import is_model_tensor
from megatron_lite.checkpoint.resume import (
    check_fingerprints,
    check_model,
    config_as_json,
    describe,
    resume_schedule,
    schedule_config,
)
from megatron_lite.checkpoint.save import SaveReport, save_checkpoint
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.schedules.progress import Progress
from megatron_lite.train.engine import Engine

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What a run starts from: a checkpoint, or nothing.

    Attributes:
        path: the checkpoint's folder; None: fresh weights.
        manifest: what it holds.
    """

    path: Path | None = None
    manifest: Manifest | None = None


def find_start(config: RunConfig, notify: Notify) -> Start:
    """The checkpoint that --load means.

    Raises:
        CheckpointError: it is damaged, or missing under --exit-on-missing-checkpoint; or the run would write over
            checkpoints of a longer one.
    """
    options = config.checkpoint
    path = None
    if options.load:
        path = find_checkpoint(
            options.load, options.load_iteration, fallback=options.fallback_on_corrupt, notify=notify
        )
    if path is None and options.load:
        if options.exit_on_missing:
            raise CheckpointError(
                "--load must hold a checkpoint under --exit-on-missing-checkpoint",
                found=f"{options.load} holds none",
                fix="Correct --load, or leave --exit-on-missing-checkpoint out to start from fresh weights",
            )
        notify(f"WARNING: --load {options.load} holds no checkpoint: starting from fresh weights")
    _refuse_to_overwrite(config, path)
    return Start(path, read_manifest(path)) if path is not None else Start()


def settle_config(config: RunConfig, start: Start, notify: Notify) -> RunConfig:
    """The config to go on with: the command line's, its schedule compared with the checkpoint's.

    Raises:
        CheckpointError: the model is another, or the schedules differ and no flag says which wins.
    """
    if start.manifest is None:
        return config
    saved = start.manifest.provenance.config
    check_model(saved, config_as_json(config))
    if config.checkpoint.finetune or "lr" not in saved:
        return config
    options = config.checkpoint
    settled, differences = resume_schedule(
        schedule_config(saved, config),
        config,
        override=options.override_schedule,
        use_checkpoint=options.use_checkpoint_schedule,
    )
    if differences:
        whose = "command line's" if options.override_schedule else "checkpoint's"
        notify(f"the {whose} learning-rate schedule is taken:\n{describe(differences)}")
    return settled


def load_start(start: Start, engine: Engine, config: RunConfig, provenance: Provenance, notify: Notify) -> Progress:
    """Fills the engine's tensors from the checkpoint and returns the progress to go on from; a collective call.

    Raises:
        CheckpointError: as load_checkpoint; or tokenizer, data or code are not those that the run began with.
    """
    if start.path is None or start.manifest is None:
        return Progress()
    options = config.checkpoint
    if not options.finetune:
        check_fingerprints(
            start.manifest.provenance.fingerprints, provenance.fingerprints, accepted=options.accept_changed
        )
    weights_only = options.finetune or not options.load_optimizer
    path, scalars = load_latest(
        start.path,
        engine.state_tensors(),
        engine.world,
        include=is_model_tensor if weights_only else None,
        fallback=options.fallback_on_corrupt,
        notify=notify,
    )
    if not weights_only:
        engine.load_scalars(scalars["engine"])
    progress = Progress() if options.finetune else Progress.from_dict(scalars["progress"])
    if options.reset_progress:
        progress = Progress()
    notify(f"  successfully loaded checkpoint from {path.parent} at iteration {iteration_of(path)}")
    return progress


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
        if self._saver is not None and kind is None:
            self._announce(self._saver.wait())
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
        root, keep_last = Path(self._options.save), self._options.keep_last
        self._notify(f"saving checkpoint at iteration {progress.iteration:7d} to {root}")
        if self._saver is None:
            self._announce(
                save_checkpoint(
                    root, progress.iteration, tensors, scalars, self._provenance, self._world, keep_last=keep_last
                )
            )
            return
        self._announce(self._saver.wait())
        blocked = self._saver.save(root, progress.iteration, tensors, scalars, self._provenance, keep_last=keep_last)
        self._notify(f"  copied it in {blocked:.2f} s; it is written while training goes on")

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


def _refuse_to_overwrite(config: RunConfig, start: Path | None) -> None:
    if not config.checkpoint.save:
        return
    root = Path(config.checkpoint.save)
    begins = 0
    if start is not None and not config.checkpoint.finetune and not config.checkpoint.reset_progress:
        begins = iteration_of(start) or 0
    later = [path for path in list_checkpoints(root) if (iteration_of(path) or 0) > begins]
    if later:
        raise CheckpointError(
            "A run does not write over checkpoints that it did not start from",
            found=f"--save {root} holds {later[-1].name}, this run starts at iteration {begins}",
            fix=f"Add --load {root} to go on from there, move those checkpoints away, or give another --save",
        )
