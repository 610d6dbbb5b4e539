"""Storage checks before a job is queued: --save folder, size and number of checkpoints, free space and inodes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count, format_size
from megatron_lite.ops.job import Job
from megatron_lite.ops.quota import Space
from megatron_lite.planner.disk import Storage
from megatron_lite.runs.exit_status import completed_iteration
from megatron_lite.schedules.length import last_iteration


def folder_problems(folder: Path) -> Iterator[ConfigError]:
    """Yield an error if the --save folder cannot be written."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        yield ConfigError(
            f"--save {folder} cannot be created: {existing} is a file",
            fix="Give another --save folder, or move the file",
        )
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield ConfigError(
            f"--save {folder} cannot be written: no permission for {existing}",
            fix=f"Give another --save folder, or ask for permission (ls -ld {existing})",
        )


def saves_line(config: RunConfig) -> str:
    """Return the schedule of saves in one line."""
    last, done, parts = math.inf if config.awaits_epochs else last_iteration(config), 0.0, []
    for phase in config.checkpoint.phases:
        if done < last and phase.interval:
            done = min(phase.until or last, last)
            parts.append(f"every {phase.interval:,} to {f'iteration {done:,}' if done < math.inf else 'the end'}")
    return f"{', '.join(parts) or 'at the end only'} in --save {config.checkpoint.save}"


def completion_problems(config: RunConfig) -> Iterator[ConfigError]:
    """Yield an error if the run in the --save folder is complete."""
    folder = Path(config.checkpoint.save)
    done = completed_iteration(folder)
    if config.awaits_epochs:
        return  # the job itself finds that it is complete
    if done is not None and done >= last_iteration(config):
        yield ConfigError(
            f"The run in --save {folder} is complete: it reached iteration {done:,}",
            fix="Raise --train-iters or --train-samples, or give another --save folder",
        )


def of_array_task(job: Job, error: ConfigError) -> ConfigError:
    """Return the error of a complete run; of an array with a run for each task, with the task and the other ones."""
    first, *others = job.resources.array or (0,)
    if not others or b"SLURM_ARRAY" not in job.path.read_bytes():
        return error
    spans: list[list[int]] = []
    for index in others:
        if spans and index == spans[-1][-1] + 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    limit = "".join(job.resources.options["array"].partition("%")[1:])
    rest = ",".join("-".join(map(str, span)) for span in spans) + limit
    return ConfigError(
        f"Task {first} of the array: {error.problem}",
        fix=f"Submit the other tasks with --sbatch=--array={rest}. Otherwise: {error.fix}",
    )


def nearest_existing(folder: Path) -> Path:
    """Return a folder, or the lowest one above it that exists."""
    # Unlike Path.exists, os.path.exists is False for a path below a folder that the user may not enter.
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))  # noqa: PTH110


def space_problems(storage: Storage, space: Space, existing: Path) -> Iterator[ConfigError]:
    """Yield an error for each limit that allows not even one checkpoint."""
    if storage.checkpoint > space.free:
        yield ConfigError(
            f"A checkpoint takes {format_size(storage.checkpoint)}, and {existing} has {format_size(space.free)} "
            f"{space.free_limit}",
            fix=f"Free space there (see df -h {existing}; quota -s), or give a --save folder on another file system",
        )
    per_save = storage.files // max(1, storage.kept)
    if space.inodes is not None and per_save > space.inodes:
        yield ConfigError(
            f"A checkpoint has {format_count(per_save, 'file')}, and {existing} has room for {space.inodes:,} "
            f"({'the limit of the file system' if space.inode_limit == 'free' else space.inode_limit})",
            fix="Delete files that you no longer need on that file system "
            f"(see {f'df -i {existing}' if space.inode_limit == 'free' else f'quota -s; lfs quota {existing}'}), or "
            "give a --save folder on another one",
        )


def space_warnings(storage: Storage, space: Space, existing: Path) -> Iterator[str]:
    """Yield a warning for each limit that the save schedule exceeds in the course of the run."""
    if storage.checkpoint <= space.free < storage.total:
        yield (
            f"{format_count(storage.kept, 'checkpoint')} take {format_size(storage.total)}, and {existing} has "
            f"{format_size(space.free)} {space.free_limit}: keep fewer with --keep-last N"
        )
    if space.inodes is not None and space.inodes < storage.files:
        yield (
            f"The checkpoints have {format_count(storage.files, 'file')}, and {existing} has room for "
            f"{space.inodes:,} ({space.inode_limit}): keep fewer with --keep-last N"
        )
