"""Checks of a Slurm job before it is queued: flags, files, layout, time limit, disk space, run folder, partition."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.config.arguments import ParsedRun, parse_run
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.files import missing_files
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, ConfigErrors, MegatronLiteError
from megatron_lite.formatting import format_count, format_duration, format_size
from megatron_lite.ops.job import Job
from megatron_lite.runs.exit_status import completed_iteration
from megatron_lite.runs.lock import read_owner
from megatron_lite.runs.metrics_file import read_records
from megatron_lite.schedules.length import last_iteration
from megatron_lite.schedules.saves import save_iterations

RECENT = 50
"""Iterations whose median is the measured step time."""
OPTIMIZER_BYTES = 8
"""Of a parameter: Adam's two moments in fp32."""


@dataclass
class Submission:
    """A job with the result of its checks.

    Attributes:
        job: the batch script.
        parsed: the training command's configuration; None: its flags are wrong.
        problems: why the job cannot work.
        warnings: what deserves a look.
        facts: lines of the plan, (title, text).
    """

    job: Job
    parsed: ParsedRun | None = None
    problems: list[ConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def check_job(job: Job, *, step_seconds: float | None = None) -> Submission:
    """Check a job without a GPU and without running its programs.

    Args:
        job: the batch script.
        step_seconds: seconds of an iteration; None: the median of the run's last iterations, if it has any.
    """
    submission = Submission(job)
    _note_missing_variables(submission)
    with _script_files(job) as flags:
        try:
            submission.parsed = parse_run(flags, world_size=job.world_size)
        except ConfigErrors as errors:
            submission.problems += errors.errors
        except ConfigError as error:
            submission.problems.append(error)
        else:
            submission.problems += missing_files(submission.parsed.config)
    _check_allocation(submission)
    if submission.parsed is not None:
        config = submission.parsed.config
        _check_time(submission, config, step_seconds)
        _check_folder(submission, config)
        _check_disk(submission, config)
    _check_partition(submission)
    return submission


@contextmanager
def _script_files(job: Job) -> Iterator[list[str]]:
    """Yield the training flags; files that the script would write lie in a temporary folder meanwhile."""
    folder = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        flags = []
        for place, word in enumerate(job.command.flags):
            content = job.evaluation.files.get(os.path.normpath(job.folder / word))
            if content is not None and not word.startswith("-"):
                path = Path(temporary) / f"{place}-{Path(word).name}"
                path.write_text(content, encoding="utf-8")
                flags.append(str(path))
            else:
                flags.append(word)
        try:
            if job.folder.is_dir():
                os.chdir(job.folder)
            yield flags
        finally:
            os.chdir(folder)


def _note_missing_variables(submission: Submission) -> None:
    missing = [name for name in submission.job.evaluation.missing if not name.startswith("SLURM_")]
    if missing:
        submission.warnings.append(
            f"not set, so that nothing stands in their place: {', '.join(f'${name}' for name in missing)}"
        )
    submission.warnings += submission.job.evaluation.notes


def _check_allocation(submission: Submission) -> None:
    """Compare the number of ranks with the GPUs that the job asks for."""
    job = submission.job
    world_size = submission.parsed.config.parallel.world_size if submission.parsed else job.world_size
    gpus = f"{format_count(job.num_gpus, 'GPU')} on " if job.num_gpus else ""
    submission.facts.append(("Allocation", f"{gpus}{format_count(job.num_nodes, 'node')}, {world_size} ranks"))
    if job.num_gpus is None or world_size is None or world_size == job.num_gpus:
        return
    per_node = (
        f"{format_count(job.num_nodes, 'node')} with {format_count(job.resources.gpus_per_node or 0, 'GPU')} each"
    )
    if world_size > job.num_gpus:
        submission.problems.append(
            ConfigError(
                f"The command starts {world_size} ranks, but the job has {format_count(job.num_gpus, 'GPU')} "
                f"({per_node})",
                rule="Each rank needs a GPU of its own",
                fix="Raise --nodes or --gpus-per-node, or start fewer tasks",
            )
        )
    else:
        submission.warnings.append(f"{job.num_gpus - world_size} of the job's {job.num_gpus} GPUs are not used")


def _check_time(submission: Submission, config: RunConfig, step_seconds: float | None) -> None:
    """Compare the time limit with what makes the run save and stop before it."""
    limit, signal = submission.job.resources.time_limit, submission.job.resources.signal
    exit_after = config.training.exit_duration_minutes * 60
    measured = step_seconds or _measured_step(config)
    if limit is None:
        submission.facts.append(("Time limit", "the partition's"))
        return
    submission.facts.append(("Time limit", format_duration(limit)))
    if exit_after >= limit:
        submission.problems.append(
            ConfigError(
                f"--exit-duration-in-mins {config.training.exit_duration_minutes:g} is not below the time limit "
                f"of {limit / 60:g} minutes (--time)",
                fix=f"Give --exit-duration-in-mins {max(1, int(limit / 60 * 0.95) - 1)} or less, or a longer --time",
            )
        )
    if not exit_after and signal is None:
        submission.warnings.append(
            "nothing stops the run before its time limit: add #SBATCH --signal=USR1@600 or --exit-duration-in-mins"
        )
    if measured is None:
        return
    spare = limit - (exit_after if 0 < exit_after < limit else limit - (signal[1] if signal else 0))
    iterations = int((limit - spare) / measured)
    submission.facts.append(("Step", f"{measured:.3g} s an iteration: about {iterations:,} iterations in one job"))
    interval = min((phase.interval for phase in config.checkpoint.phases if phase.interval), default=0)
    if iterations < 1 or (not exit_after and signal is None and interval > iterations):
        submission.problems.append(
            ConfigError(
                f"The job ends before its first save: about {iterations:,} iterations of {measured:.3g} s fit into "
                f"{format_duration(limit)} (--time), and --save-interval is {interval:,}",
                fix=f"Give --save-interval {max(1, iterations // 2)} or less, #SBATCH --signal=USR1@600, or a longer "
                "--time",
            )
        )


def _measured_step(config: RunConfig) -> float | None:
    """Return the median time of the run's last iterations in seconds; None: it has none."""
    if not config.checkpoint.save:
        return None
    try:
        records = read_records(Path(config.checkpoint.save) / "metrics.jsonl")
    except MegatronLiteError:
        return None
    seconds = [record["seconds_per_iteration"] for record in records if "seconds_per_iteration" in record]
    return statistics.median(seconds[-RECENT:]) if seconds else None


def _check_folder(submission: Submission, config: RunConfig) -> None:
    """Check that the --save folder can be written, holds no completed run and no job."""
    if not config.checkpoint.save:
        submission.warnings.append("there is no --save: the job leaves nothing behind")
        return
    folder = Path(config.checkpoint.save)
    existing = _nearest_existing(folder)
    if not os.access(existing, os.W_OK):
        submission.problems.append(
            ConfigError(
                f"--save {folder} cannot be written: no permission for {existing}",
                fix=f"Give another --save folder, or ask for permission (ls -ld {existing})",
            )
        )
    if (done := completed_iteration(folder)) is not None and done >= last_iteration(config):
        submission.problems.append(
            ConfigError(
                f"The run in --save {folder} is complete: it reached iteration {done:,}",
                fix="Raise --train-iters or --train-samples, or give another --save folder",
            )
        )
    if (owner := read_owner(folder)) is not None:
        submission.warnings.append(f"--save {folder} is in use by {owner}: a job that starts before it ends is refused")


def _nearest_existing(folder: Path) -> Path:
    """Return a folder, or the lowest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _check_disk(submission: Submission, config: RunConfig) -> None:
    """Compare the free space below --save with the checkpoints that the run keeps."""
    checkpoint = config.checkpoint
    if not checkpoint.save:
        return
    weight = 4 if config.precision.dtype == "fp32" else 2
    main = 0 if config.precision.dtype == "fp32" else 4
    state = main + OPTIMIZER_BYTES if checkpoint.save_optimizer else 0
    size = parameter_count(config.model) * (weight + state)
    saves = sum(len(iterations) for iterations in save_iterations(checkpoint, last_iteration(config))) or 1
    # While a save is written, the oldest checkpoint is still there.
    kept = min(saves, checkpoint.keep_last + 1) if checkpoint.keep_last and not checkpoint.keep_every else saves
    existing = _nearest_existing(Path(checkpoint.save))
    free = shutil.disk_usage(existing).free
    submission.facts.append(
        ("Disk", f"{format_count(kept, 'checkpoint')} of {format_size(size)}, {format_size(free)} free at {existing}")
    )
    if size > free:
        submission.problems.append(
            ConfigError(
                f"A checkpoint takes {format_size(size)}, and {existing} has {format_size(free)} free",
                fix="Free space, or give a --save folder on another file system",
            )
        )
    elif kept * size > free:
        submission.warnings.append(
            f"{format_count(kept, 'checkpoint')} take {format_size(kept * size)}, and {existing} has "
            f"{format_size(free)} free: keep fewer with --keep-last N"
        )


def _check_partition(submission: Submission) -> None:
    """Check that Slurm knows the partition."""
    asked = submission.job.resources.options.get("partition")
    if not asked or shutil.which("sinfo") is None:
        return
    done = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, encoding="utf-8", check=False)
    known = sorted(set(done.stdout.split()))
    if done.returncode == 0 and (unknown := [name for name in asked.split(",") if name not in known]):
        submission.problems.append(
            ConfigError(
                f"The cluster has no partition {', '.join(unknown)} (--partition {asked})",
                fix=f"Give one of {', '.join(known)}",
            )
        )
