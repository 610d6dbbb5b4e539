"""Data position lookup for `data samples`: consumed samples and data order at a given iteration of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lite.config.run import RunConfig
from megatron_lite.data.format.fingerprint import data_fingerprints
from megatron_lite.errors import DataError
from megatron_lite.runs.catalog import find_checkpoint, iteration_of, list_checkpoints
from megatron_lite.runs.comparison import continue_history, describe, fingerprint_differences, read_history
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.schedules.data_order import DataSegment
from megatron_lite.schedules.length import consumed_at
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.skipping import Ranges


@dataclass(frozen=True)
class Position:
    """Data position of an iteration.

    Attributes:
        config: config of the job that ran the iteration, or will run it.
        order: samples requested of the datasets.
        consumed: samples consumed before the iteration.
        skipped: positions in the data order that are left out since a rollback.
        past: True if the iteration is at or before the latest checkpoint.
        notes: remarks for the user.
    """

    config: RunConfig
    order: DataSegment
    consumed: int
    skipped: Ranges
    past: bool
    notes: tuple[str, ...] = ()


def saved_history(config: RunConfig) -> tuple[DataSegment, ...]:
    """Return the data history of the run that this command would continue; its last segment is the current one."""
    path = _latest(config)
    return continue_history(read_manifest(path) if path is not None else None, config)


def find_position(config: RunConfig, iteration: int) -> Position:
    """Return the data position of an iteration.

    Args:
        config: the job's config. Iterations up to the latest checkpoint of --load were run by earlier jobs, whose
            data, batch size and order are in the checkpoints.
        iteration: number of the iteration, from 1.

    Raises:
        DataError: the data that the iteration read no longer exist.
    """
    path = _latest(config)
    if path is None:
        return Position(config, continue_history(None, config)[-1], consumed_at(config, iteration - 1), (), past=False)
    latest = read_manifest(path)
    skipped = latest.provenance.skipped_samples
    if latest.iteration < iteration:
        consumed = consumed_at(config, iteration - 1, Progress.from_dict(latest.scalars["progress"]))
        return Position(config, continue_history(latest, config)[-1], consumed, skipped, past=False)
    saved = [other for other in list_checkpoints(path.parent) if (iteration_of(other) or 0) < latest.iteration]
    later = [other for other in saved if (iteration_of(other) or 0) >= iteration]
    history = read_history((read_manifest(later[0]) if later else latest).provenance, config)
    segment = next((one for one in reversed(history) if one.iteration < iteration), None)
    if segment is None:
        raise DataError(
            f"The checkpoints in {config.checkpoint.load} do not record the data of iteration {iteration}: their "
            "records "
            f"begin later (the latest checkpoint is of iteration {latest.iteration})",
            fix="Remove --load, and give the flags that the run had at that iteration",
        )
    starts = [Progress(iteration=segment.iteration, consumed_train_samples=segment.consumed)]
    if earlier := saved[: len(saved) - len(later)]:
        starts.append(Progress.from_dict(read_manifest(earlier[-1]).scalars["progress"]))
    start = max(starts, key=lambda progress: progress.iteration)
    then, notes = _config_of(segment, config)
    return Position(then, segment, consumed_at(then, iteration - 1, start), skipped, past=True, notes=notes)


def _latest(config: RunConfig) -> Path | None:
    """Return the checkpoint that the job resumes from; None: it starts at the beginning of its data."""
    options = config.checkpoint
    if not options.load or options.finetune or options.reset_progress:
        return None
    return find_checkpoint(options.load, options.load_iteration)


def _config_of(segment: DataSegment, config: RunConfig) -> tuple[RunConfig, tuple[str, ...]]:
    """Return the config of the job that read a segment, and notes on differences from the data of the flags.

    Raises:
        DataError: the files of its data have changed since.
    """
    then = segment.apply_to(config)
    changed = fingerprint_differences(segment.fingerprints, data_fingerprints(config))
    if not changed:
        return replace(then, data=config.data), ()  # the files may have been moved since
    if replaced := fingerprint_differences(segment.fingerprints, data_fingerprints(then)):
        raise DataError(
            f"The datasets have changed since the run read them:\n{describe(replaced)}\n",
            fix="Give --data-path, and the tokenizer, the files that the run had at that iteration",
        )
    return then, (f"read from other data, or in another order, than given by these flags:\n{describe(changed)}",)
