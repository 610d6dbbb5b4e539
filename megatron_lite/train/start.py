"""Start point of a run: finds, checks and loads the checkpoint named by --load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.load import load_latest
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.lifecycle.exit_status import not_writable
from megatron_lite.runs.catalog import (
    find_checkpoint,
    folder_name,
    is_complete,
    iteration_of,
    list_iterations,
    locate,
    set_latest,
    unrecorded_iteration,
)
from megatron_lite.runs.comparison import (
    check_model,
    config_as_json,
    describe,
    resume_schedule,
    schedule_config,
)
from megatron_lite.runs.exit_status import completed_iteration
from megatron_lite.runs.manifest import Manifest, read_manifest
from megatron_lite.runs.turnover import set_damaged_aside
from megatron_lite.schedules.length import is_finished, last_iteration
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

    def continued(self, config: RunConfig) -> Manifest | None:
        """The manifest, if the run goes on in its data and its history where the checkpoint stands."""
        options = config.checkpoint
        return None if options.finetune or options.reset_progress else self.manifest


def find_start(config: RunConfig, notify: Notify, world: Group | None = None) -> Start:
    """The checkpoint that --load means.

    Args:
        config: the run.
        notify: told of what is surprising.
        world: all ranks, of which the first looks for all (a collective call); None: this one looks for itself.

    Raises:
        CheckpointError: it is damaged, or missing under --exit-on-missing-checkpoint; or --save cannot be written to,
            or the run would write over checkpoints of a longer one there.
    """
    if world is None:
        _require_writable(config.checkpoint.save)
        return _find_start(config, notify)
    run_on_all_ranks(world, lambda: _require_writable(config.checkpoint.save))
    # Folders of a network may look different to other ranks for a moment, and 256 ranks listing one take their time.
    told: list[str] = []
    start, told = broadcast_from_rank0(world, lambda: (_find_start(config, told.append), told))
    for text in told:
        notify(text)
    return start


def _find_start(config: RunConfig, notify: Notify) -> Start:
    options = config.checkpoint
    path = None
    if options.in_one_folder and not options.load_iteration:
        _finish_announcement(Path(options.save), notify)
    if options.load:
        path = find_checkpoint(
            options.load, options.load_iteration, fallback=options.fallback_on_corrupt, notify=notify
        )
    if path is None and options.load:
        if options.exit_on_missing:
            raise CheckpointError(
                "--load must name a folder of checkpoints under --exit-on-missing-checkpoint",
                found=f"{options.load} {'holds none' if Path(options.load).is_dir() else 'does not exist'}",
                fix="Give --load the --save folder of a run, or leave --exit-on-missing-checkpoint out to start afresh",
            )
        # The same command that starts a run goes on with it later, so this is usual where --load is --save.
        warning = "" if options.in_one_folder else "WARNING: "
        problem = "holds no checkpoint" if Path(options.load).is_dir() else "does not exist"
        notify(f"{warning}--load {options.load} {problem}: starting from fresh weights")
    _refuse_to_overwrite(config, path)
    return Start(path, read_manifest(path)) if path is not None else Start()


def _finish_announcement(root: Path, notify: Notify) -> None:
    """Announces a checkpoint that a job finished and died before it could say so, so that nothing is done twice."""
    if (iteration := unrecorded_iteration(root)) is not None:
        notify(
            f"{folder_name(iteration)} is complete, and the job that saved it was killed before it was recorded as the "
            "latest: loading it"
        )
        set_latest(root, iteration)


@dataclass(frozen=True)
class Completed:
    """A run that was completed before: at which iteration, and what to tell the user."""

    iteration: int
    text: str


def already_complete(config: RunConfig) -> Completed | None:
    """Return whether a run was completed before, its last evaluations included; None: there is work left.

    Every rank asks, for there is nobody to ask yet: a machine need not be set up for a run that is over. It costs a
    rank one small file, and only where that is there the newest checkpoint's manifest.

    Raises:
        CheckpointError: --load is damaged, or holds another model.
    """
    options = config.checkpoint
    if not options.load or options.finetune or options.reset_progress or config.training.skip_train:
        return None
    given = Path(options.load)
    completed = completed_iteration(given if iteration_of(given) is None else given.parent)
    if completed is None:
        return None
    path = find_checkpoint(
        options.load, options.load_iteration, fallback=options.fallback_on_corrupt, notify=lambda _: None
    )
    if path is None:
        return None
    manifest = read_manifest(path)
    progress = Progress.from_dict(manifest.scalars["progress"])
    if completed != progress.iteration or not is_finished(config, progress):
        return None
    saved = manifest.provenance.config
    if not config.model.vocab_size:  # the tokenizer has not been asked yet
        config = replace(config, model=replace(config.model, vocab_size=saved["model"]["vocab_size"]))
    check_model(saved, config_as_json(config))
    length = "--train-iters" if config.training.train_iters else "--train-samples"
    text = (
        f"This run is complete: it ended at iteration {progress.iteration}, saved in {path}, and this command asks for "
        f"{last_iteration(config)}. Nothing was done. To train on, give a larger {length}, and "
        "--override-opt_param-scheduler to stretch the learning rate's decay to it or "
        "--use-checkpoint-opt_param-scheduler to keep the one that has ended; to evaluate it again, add --skip-train."
    )
    return Completed(completed, text)


def settle_config(config: RunConfig, start: Start, notify: Notify) -> RunConfig:
    """The config to go on with: the command line's, its schedule compared with the checkpoint's.

    Raises:
        CheckpointError: the model is another, or the schedules differ and no flag says which wins.
    """
    if start.manifest is None:
        return config
    saved = start.manifest.provenance.config
    check_model(saved, config_as_json(config))
    if config.checkpoint.finetune or config.training.skip_train or "lr" not in saved:
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


def load_start(start: Start, engine: Engine, config: RunConfig, notify: Notify) -> tuple[Start, Progress]:
    """Fills the engine's tensors from the checkpoint; a collective call.

    Returns:
        What was loaded (an earlier checkpoint, if this one is damaged and may be passed over), and the progress to go
        on from.

    Raises:
        CheckpointError: as load_checkpoint.
    """
    if start.path is None:
        return start, Progress()
    options = config.checkpoint
    weights_only = options.finetune or not options.load_optimizer or config.training.skip_train
    path, scalars, skipped = load_latest(
        start.path,
        engine.state_tensors(),
        engine.world,
        weights_only=weights_only,
        fallback=options.fallback_on_corrupt,
    )
    for message in skipped:
        notify(message)
    if not weights_only:
        engine.load_scalars(scalars["engine"])
    progress = Progress() if options.finetune else Progress.from_dict(scalars["progress"])
    if options.reset_progress:
        progress = Progress()
    notify(f"  successfully loaded checkpoint from {path.parent} at iteration {iteration_of(path)}")
    if path == start.path:
        return start, progress
    if not config.training.skip_train and options.in_one_folder and start.continued(config) is not None:
        _set_damaged_aside(path, engine.world, notify)
    return Start(path, read_manifest(path)), progress


def _set_damaged_aside(path: Path, world: Group, notify: Notify) -> None:
    """Damaged checkpoints that were passed over make way for the run's own, which will be older at first."""
    aside = broadcast_from_rank0(world, lambda: set_damaged_aside(path.parent, iteration_of(path) or 0))
    if aside:
        notify(f"what was passed over is kept as {', '.join(aside)}")


def _require_writable(save: str) -> None:
    """Tries it now: the first save may be hours away."""
    if not save:
        return
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=save):
            pass
    except OSError as error:
        raise not_writable(Path(save), error) from error


def _refuse_to_overwrite(config: RunConfig, start: Path | None) -> None:
    if not config.checkpoint.save:
        return
    root = Path(config.checkpoint.save)
    begins = 0
    if start is not None and not config.checkpoint.finetune and not config.checkpoint.reset_progress:
        begins = iteration_of(start) or 0
    later = [path for number in list_iterations(root) if number > begins and is_complete(path := locate(root, number))]
    if not later:
        return
    options = config.checkpoint
    anew = "--finetune" if options.finetune else "--reset-iteration" if options.reset_progress else ""
    if start is None or start.parent != root:
        go_on = f"Add --load {root}" + (f" and leave {anew} out" if anew else "")
    else:
        go_on = f"Leave {anew or '--load-iteration'} out"
    raise CheckpointError(
        "A run does not write over checkpoints that it did not start from",
        found=f"--save {root} holds {later[-1].name}, this run starts at iteration {begins}",
        fix=f"{go_on} to go on from there, move those checkpoints away, or give another --save",
    )
