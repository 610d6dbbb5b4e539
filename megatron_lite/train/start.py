"""Resume entry point: finds the checkpoint named by --load, checks it and loads it into the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.load import load_latest
from megatron_lite.config.run import RunConfig
from megatron_lite.data.serving.epochs import with_epochs
from megatron_lite.errors import CheckpointError
from megatron_lite.lifecycle.best import BestValidation
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
    check_optimizer,
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
    """Start point of a run: a checkpoint, or fresh weights.

    Attributes:
        path: the checkpoint's folder; None: fresh weights.
        manifest: the checkpoint's.
    """

    path: Path | None = None
    manifest: Manifest | None = None

    def continued(self, config: RunConfig) -> Manifest | None:
        """Return the manifest if the run resumes data and progress from the checkpoint."""
        options = config.checkpoint
        return None if options.finetune or options.reset_progress else self.manifest


def find_start(config: RunConfig, notify: Notify, world: Group) -> Start:
    """Find the checkpoint of --load on rank 0, and broadcast it; a collective call.

    Args:
        config: the run.
        notify: receives lines about anything unusual.
        world: all ranks.

    Raises:
        CheckpointError: it is damaged, or missing under --exit-on-missing-checkpoint; or --save cannot be written to,
            or the run would overwrite checkpoints of a longer one there.
    """
    run_on_all_ranks(world, lambda: _require_writable(config.checkpoint.save))
    # On one rank: network file systems may show ranks different folders for a moment, and 256 listings take long.
    messages: list[str] = []
    start, messages = broadcast_from_rank0(world, lambda: (_find_start(config, messages.append), messages))
    for text in messages:
        notify(text)
    return start


def _find_start(config: RunConfig, notify: Notify) -> Start:
    options = config.checkpoint
    path = None
    resumes, root = options.in_one_folder and not options.load_iteration, Path(options.save)
    # A job that was killed before it recorded a complete save as the latest: no work is to be repeated.
    if resumes and (iteration := unrecorded_iteration(root)) is not None:
        notify(
            f"{folder_name(iteration)} is complete, and the job that saved it was killed before it was recorded as "
            "the latest: loading it"
        )
        set_latest(root, iteration)
    if options.load:
        path = find_checkpoint(
            options.load, options.load_iteration, fallback=options.fallback_on_corrupt, notify=notify
        )
    if path is None and options.load:
        if options.exit_on_missing:
            raise CheckpointError(
                f"--load {options.load} "
                f"{'contains no checkpoint' if Path(options.load).is_dir() else 'does not exist'} "
                "(--exit-on-missing-checkpoint is given)",
                fix="Give --load the --save folder of a run, or remove --exit-on-missing-checkpoint to start from "
                "newly initialized "
                "weights",
            )
        # Usual if --load is --save: the command that starts a run also resumes it.
        warning = "" if options.in_one_folder else "WARNING: "
        problem = "holds no checkpoint" if Path(options.load).is_dir() else "does not exist"
        notify(f"{warning}--load {options.load} {problem}: starting from fresh weights")
    _refuse_to_overwrite(config, path)
    return Start(path, read_manifest(path)) if path is not None else Start()


@dataclass(frozen=True)
class Completed:
    """A run that was completed before: its last iteration, and the message for the user."""

    iteration: int
    text: str


def already_complete(config: RunConfig) -> Completed | None:
    """Return the end of a run that was completed before, with its last evaluations; None: there is work left.

    Every rank checks this before the rendezvous, so that a complete run needs none. It reads one small file, and the
    newest checkpoint's manifest only if that file exists.

    Raises:
        CheckpointError: the checkpoint of --load is damaged, or holds another model.
        DataError: the data of --epochs cannot be opened.
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
    best = BestValidation(config.tuning.patience, config.tuning.patience_threshold)
    best.load(manifest.scalars.get("best", best.state()))
    config = with_epochs(config)
    reached = is_finished(config, progress)
    if completed != progress.iteration or not (reached or best.exhausted):
        return None
    saved = manifest.provenance.config
    if not config.model.vocab_size:  # the tokenizer is not open yet
        config = replace(config, model=replace(config.model, vocab_size=saved["model"]["vocab_size"]))
    check_model(saved, config_as_json(config))
    if not reached:
        text = (
            f"This run is complete, saved in {path}: {best.describe()}. Nothing was done. To continue training, give a "
            "larger --early-stopping-patience; to evaluate again, add --skip-train."
        )
        return Completed(completed, text)
    lengths = {"--train-iters": config.training.train_iters, "--epochs": config.tuning.epochs, "--train-samples": 1}
    length = next(flag for flag, number in lengths.items() if number)
    text = (
        f"This run is complete: it ended at iteration {progress.iteration}, saved in {path}, and this command has "
        f"{last_iteration(config)} iterations. Nothing was done. To continue training, give a larger {length}, and "
        "--override-opt-param-scheduler to stretch the learning rate's decay to it or "
        "--use-checkpoint-opt-param-scheduler to stay at the final rate; to evaluate again, add --skip-train."
    )
    return Completed(completed, text)


def settle_config(config: RunConfig, start: Start, notify: Notify) -> RunConfig:
    """Return the config with which to run: the command line's, after comparison with the checkpoint's.

    Raises:
        CheckpointError: the model or the optimizer differs, or the schedules differ and no flag gives precedence.
    """
    if start.manifest is None:
        return config
    saved = start.manifest.provenance.config
    check_model(saved, config_as_json(config))
    if config.checkpoint.finetune or config.training.skip_train or "lr" not in saved:
        return config
    options = config.checkpoint
    if options.load_optimizer:
        check_optimizer(saved, config_as_json(config))
    settled, differences = resume_schedule(
        schedule_config(saved, config),
        config,
        override=options.override_schedule,
        use_checkpoint=options.use_checkpoint_schedule,
    )
    if differences:
        whose = "command line's" if options.override_schedule else "checkpoint's"
        notify(f"using the {whose} learning-rate schedule:\n{describe(differences)}")
    return settled


def load_start(start: Start, engine: Engine, config: RunConfig, notify: Notify) -> tuple[Start, Progress]:
    """Load the engine's tensors from the checkpoint; a collective call.

    Returns:
        The checkpoint that was loaded (an earlier one if this is damaged, under --fallback-on-corrupt), and the
        progress from which to resume.

    Raises:
        CheckpointError: as load_checkpoint.
    """
    if start.path is None:
        return start, Progress()
    options = config.checkpoint
    weights_only = options.finetune or not options.load_optimizer or config.training.skip_train
    read = partial(
        load_latest,
        start.path,
        world=engine.world,
        weights_only=weights_only,
        restart_average=options.finetune,
        fallback=options.fallback_on_corrupt,
    )
    path, scalars, skipped = engine.fill(read)
    for message in skipped:
        notify(message)
    messages = [] if weights_only else engine.load_scalars(scalars["engine"])
    progress = Progress() if options.finetune else Progress.from_dict(scalars["progress"])
    if options.reset_progress:
        progress = Progress()
    notify(f"  successfully loaded checkpoint from {path.parent} at iteration {iteration_of(path)}")
    for message in messages:
        notify(message)
    if path == start.path:
        return start, progress
    if not config.training.skip_train and options.in_one_folder and start.continued(config) is not None:
        # Their places are needed by the run's own checkpoints, which will be older at first.
        aside = broadcast_from_rank0(engine.world, lambda: set_damaged_aside(path.parent, iteration_of(path) or 0))
        if aside:
            notify(f"the damaged checkpoints are kept as {', '.join(aside)}")
    return Start(path, read_manifest(path)), progress


def _require_writable(save: str) -> None:
    """Write a temporary file: the first save may be hours away."""
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
    restart = "--finetune" if options.finetune else "--reset-iteration" if options.reset_progress else ""
    if start is None or start.parent != root:
        resume = f"Add --load {root}" + (f" and remove {restart}" if restart else "")
    else:
        resume = f"Remove {restart or '--load-iteration'}"
    raise CheckpointError(
        f"--save {root} contains the checkpoint {later[-1].name}, and this run starts at iteration {begins}",
        rule="A run does not overwrite later checkpoints",
        fix=f"{resume} to resume from the latest checkpoint, move the later checkpoints away, or give another --save",
    )
