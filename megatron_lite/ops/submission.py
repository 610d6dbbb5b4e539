"""Checks of a Slurm job before it is queued: flags, files, layout, time limit, disk space, run folder, partition."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_lite.config.arguments import ParsedRun, parse_run
from megatron_lite.config.files import missing_files
from megatron_lite.config.layout import axis_sizes, describe_sizes
from megatron_lite.config.paths import suggest_path
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError, ConfigErrors
from megatron_lite.formatting import format_count, format_duration, format_size
from megatron_lite.ops.duration import step_of, timing_facts, timing_of, timing_problems, timing_warnings
from megatron_lite.ops.exclude import excluded_hosts
from megatron_lite.ops.job import Job
from megatron_lite.ops.partition import Partition, exclusion_problems, partition_problems
from megatron_lite.ops.quota import free_space
from megatron_lite.ops.storage import (
    completion_problems,
    folder_problems,
    nearest_existing,
    of_array_task,
    saves_line,
    space_problems,
    space_warnings,
)
from megatron_lite.ops.watch_job import Queue, folder_user
from megatron_lite.planner.disk import Storage, storage_of
from megatron_lite.planner.summary import RunSummary, summarize
from megatron_lite.runs.catalog import latest_iteration, list_iterations
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size
from megatron_lite.tokenizer.vocabulary import fill_vocabulary

OWN_FOLDER = re.compile(r"^[^#\n]*dirname[^\n]*\$\{?(0|BASH_SOURCE)\b", re.MULTILINE)
INPUT_FLAGS = ("--input", "--load", "--text", "--data-path", "--tokenizer-model", "--vocab-file", "--merge-file")
"""Flags of commands that do not train whose values are files, folders or dataset prefixes to be read."""


@dataclass
class Submission:
    """A job with the result of its checks.

    Attributes:
        job: the batch script.
        parsed: the training command's configuration; None: its flags are wrong, or the script does not train.
        problems: reasons why the job cannot work anywhere.
        local_problems: reasons on this machine: missing files, the --save folder, disk space. Away from the cluster
            they are no errors.
        warnings: risks that do not prevent the job.
        facts: lines of the plan, (title, text).
        excluded: hosts on which the job must not run.
        complete: the error of a run that is complete; a problem if the script trains no other run.
    """

    job: Job
    parsed: ParsedRun | None = None
    problems: list[ConfigError] = field(default_factory=list)
    local_problems: list[ConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    excluded: tuple[str, ...] = ()
    complete: list[ConfigError] = field(default_factory=list)


def check_job(
    job: Job, *, step_seconds: float | None = None, partitions: dict[str, Partition] | None = None
) -> Submission:
    """Check a job without a GPU and without running its programs.

    Args:
        job: the batch script.
        step_seconds: seconds of an iteration; None: measured in the run, or estimated.
        partitions: of the cluster; None: unknown.
    """
    submission = Submission(job)
    submission.facts.append(("Job", _job_line(job)))
    submission.problems += _script_problems(job)
    _check_variables(submission)
    with working_folder(job.folder):
        if job.command is None:
            _check_programs(submission)
        else:
            _check_training(submission, step_seconds)
            _check_further(submission, step_seconds)
    if partitions is not None:
        unusable = list(partition_problems(job, partitions))
        submission.problems += unusable
        if submission.excluded and submission.parsed is not None and not unusable:
            save = job.folder / submission.parsed.config.checkpoint.save
            submission.problems += exclusion_problems(job, partitions, submission.excluded, save)
    return submission


def _script_problems(job: Job) -> Iterator[ConfigError]:
    """Yield an error for each reason why sbatch or bash would refuse the script itself."""
    content = job.path.read_bytes()
    if not content.startswith(b"#!"):
        yield ConfigError(
            f"{job.path} has no interpreter line, and sbatch refuses such a script", fix="Begin it with #!/bin/bash"
        )
    if b"\r\n" in content:
        yield ConfigError(
            f"{job.path} has the line ends of Windows, and sbatch refuses such a script",
            fix=f"Convert it: sed -i 's/\\r$//' {job.path}",
        )
    one_at_a_time = job.resources.options.get("array", "").endswith("%1")
    if job.command and len(job.resources.array) > 1 and not one_at_a_time and b"SLURM_ARRAY" not in content:
        yield ConfigError(
            f"The {len(job.resources.array)} tasks of the array (--array={job.resources.options['array']}) start the "
            "same training command at the same time",
            rule="One job at a time may write to a --save folder",
            fix="Use $SLURM_ARRAY_TASK_ID in the flags and in --save, limit the array to one task at a time "
            "(--array=…%1), or submit the job with --chain instead of --array",
        )


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Change to the folder of a script for a while, so that its relative paths are resolved as in the job."""
    before = Path.cwd()
    try:
        if folder.is_dir():
            os.chdir(folder)
        yield
    finally:
        os.chdir(before)


def _check_training(submission: Submission, step_seconds: float | None) -> None:
    job = submission.job
    assert job.command is not None
    try:
        with _script_files(job, job.command.flags) as flags:
            submission.parsed = parse_run(flags, world_size=job.world_size)
    except ConfigErrors as errors:
        submission.problems += errors.errors
    except ConfigError as error:
        submission.problems.append(error)
    _check_allocation(submission)
    tasks = sum(component.tasks_per_node * component.nodes for component in job.components)
    if tasks > 1 and job.is_started_once:
        submission.problems.append(
            ConfigError(
                f"The batch script starts the training command once, and the job has {tasks} tasks",
                rule="Commands of the batch script run on the first node only",
                fix="Write srun before the command; it starts one task for each GPU",
            )
        )
    if submission.parsed is None:
        return
    for missing in missing_files(submission.parsed.config, submission.parsed.missing, submission.parsed.spellings):
        if maker := _maker(job, missing):
            submission.warnings.append(f"{missing.problem}; `{maker}` may write it before training")
        else:
            submission.local_problems.append(missing)
    submission.warnings += submission.parsed.warnings
    try:
        config, vocabulary = fill_vocabulary(submission.parsed.config)
    except ConfigError as error:
        submission.problems.append(error)
        return
    summary = summarize(config)
    submission.facts += _summary_facts(config, summary, vocabulary)
    folder = Path(config.checkpoint.save) if config.checkpoint.save else None
    unusable = list(folder_problems(folder)) if folder else []
    submission.local_problems += unusable
    existing = list_iterations(folder) if folder and not unusable else []
    storage = storage_of(config, existing)
    step = step_of(config, job.resources, step_seconds)
    timing = timing_of(config, job.resources, step, max(existing, default=0))
    if timing is None:
        submission.facts.append(("Time limit", "the partition's"))
    else:
        submission.facts += timing_facts(timing)
        submission.problems += timing_problems(timing, config)
        submission.warnings += timing_warnings(timing)
    if folder is None:
        submission.warnings.append("there is no --save: the job writes no checkpoint")
    elif not unusable:
        _check_folder(submission, config, folder, storage)


def _check_further(submission: Submission, step_seconds: float | None) -> None:
    """Check the further training commands of a script, and judge runs that are complete."""
    job = submission.job
    finished = [submission.complete]
    if job.further:
        submission.facts.append(("Commands", f"{len(job.further) + 1}, all checked; the plan is that of the first one"))
    for number, command in enumerate(job.further, start=2):
        other = Submission(replace(job, command=command, further=()))
        _check_training(other, step_seconds)
        finished.append(other.complete)
        pairs = ((submission.problems, other.problems), (submission.local_problems, other.local_problems))
        for mine, its in pairs:
            known = {str(error) for error in mine}
            mine += [
                ConfigError(f"Training command {number} of {job.path}: {error.problem}", rule=error.rule, fix=error.fix)
                for error in its
                if str(error) not in known
            ]
        submission.warnings += [
            f"training command {number}: {w}" for w in other.warnings if w not in submission.warnings
        ]
    if all(finished):
        submission.problems += submission.complete
    else:
        submission.warnings += [error.problem for errors in finished for error in errors]


def _check_folder(submission: Submission, config: RunConfig, folder: Path, storage: Storage) -> None:
    """Check the run in the --save folder, and the space for its checkpoints."""
    existing = nearest_existing(folder)
    submission.facts.append(("Saves", saves_line(config)))
    submission.complete += [of_array_task(submission.job, problem) for problem in completion_problems(config)]
    if (lock := folder_user(folder, Queue(), time.time())) is not None:
        submission.warnings.append(
            f"--save {folder} is in use by {lock.owner}: a job that starts before it ends is refused"
        )
    space = free_space(existing)
    size = format_size(storage.checkpoint)
    kept = f"{format_count(storage.kept, 'checkpoint')} of {size}: {format_size(storage.total)}"
    kept = f"{size} for each checkpoint" if config.awaits_epochs else kept
    submission.facts.append(("Disk", f"{kept}; {format_size(space.free)} {space.free_limit} at {existing}"))
    submission.local_problems += space_problems(storage, space, existing)
    submission.warnings += space_warnings(storage, space, existing)
    try:
        submission.excluded = excluded_hosts(folder)
    except ConfigError as error:
        submission.local_problems.append(error)
    if submission.excluded:
        submission.facts.append(("Excluded", ", ".join(submission.excluded)))


def _maker(job: Job, error: ConfigError) -> str:
    """Return the earlier program of the script that names a missing file among its arguments; empty: none does."""
    for started in job.evaluation.commands:
        program = " ".join(started.arguments[:2])
        if any("." in path and path in error.problem for path in started.arguments[2:] if not path.startswith("-")):
            return "" if job.command and job.command.flags[-1:] == started.arguments[-1:] else program
    return ""


@contextmanager
def _script_files(job: Job, flags: tuple[str, ...]) -> Iterator[list[str]]:
    """Yield the training flags, with files that the script would write replaced by temporary ones."""
    with tempfile.TemporaryDirectory() as temporary:
        replaced = []
        for place, argument in enumerate(flags):
            content = job.evaluation.files.get(os.path.normpath(job.folder / argument))
            if content is not None and not argument.startswith("-"):
                path = Path(temporary) / f"{place}-{Path(argument).name}"
                path.write_text(content, encoding="utf-8")
                argument = str(path)
            replaced.append(argument)
        yield replaced


def _check_programs(submission: Submission) -> None:
    """Report commands that do not train, and input files of theirs that do not exist."""
    for program in submission.job.programs:
        submission.facts.append(("Runs", program))
        flag = ""
        for argument in shlex.split(program):
            if argument.startswith("--"):
                flag = argument
            elif flag in INPUT_FLAGS and not any(Path(argument + suffix).exists() for suffix in ("", ".idx")):
                submission.local_problems.append(
                    ConfigError(f"{flag} {argument} does not exist", fix=suggest_path(flag, argument))
                )


def _check_variables(submission: Submission) -> None:
    """Report variables without a value, sourced files that do not exist, and statements that were not evaluated."""
    evaluation, job = submission.job.evaluation, submission.job
    missing = [f"${name}" for name in evaluation.missing if not name.startswith("SLURM")]
    if positional := [name for name in missing if name[1:].isdigit()]:
        missing = [name for name in missing if name not in positional]
        problem = f"{job.path} uses its arguments {', '.join(positional)}, which are not given"
        fix = f"Give them after its name: megatron-lite slurm submit {job.path} ARGUMENT …"
        if evaluation.stops_at_missing:
            submission.local_problems.append(ConfigError(problem, rule="`set -u` ends it there", fix=fix))
        else:
            submission.warnings.append(f"{problem}, so expanded to nothing. {fix}")
    if missing and evaluation.stops_at_missing:
        submission.local_problems.append(
            ConfigError(
                f"{job.path} uses {', '.join(missing)} without a value (line {evaluation.missing[missing[0][1:]]})",
                rule="`set -u` ends it there",
                fix=f"Set it in the script, or run `export {missing[0][1:]}=…` here first (a variable that is set but "
                "not exported is not passed on)",
            )
        )
    elif missing:
        submission.warnings.append(
            f"without a value, so expanded to nothing: {', '.join(missing)}. Set them in the script, or with `export "
            "NAME=…` here (a variable that is set but not exported is not passed on)"
        )
    for name in evaluation.missing_sources:
        submission.local_problems.append(
            ConfigError(
                f"{job.path} sources {name}, which does not exist",
                rule=f"The script starts in {Path.cwd() / job.resources.options.get('chdir', '')}",
                fix=f"Submit from the folder to which {name} is relative, or give --sbatch=--chdir=FOLDER"
                if not name.startswith("/")
                else "Create the file, or source one that exists",
            )
        )
    if evaluation.failure:
        submission.local_problems.append(
            ConfigError(
                f"{job.path} {evaluation.failure}",
                fix="Give the argument (after the script's name) or exported variable that it requires there",
            )
        )
    if OWN_FOLDER.search(job.path.read_text(encoding="utf-8")):
        submission.warnings.append(
            "the script computes a path from $0: sbatch runs a copy of it in Slurm's spool folder. Use "
            "$SLURM_SUBMIT_DIR, or a path relative to the folder of submission"
        )
    submission.warnings += evaluation.notes


def _job_line(job: Job) -> str:
    options = job.resources.options
    gpus = job.resources.gpus_per_node
    parts = [format_count(job.num_nodes, "node")]
    if len(job.components) > 1:
        parts.append(f"in {len(job.components)} components, {format_count(job.num_gpus or 0, 'GPU')}")
    elif gpus:
        total = f" = {job.num_gpus} GPUs" if job.num_nodes > 1 else ""
        parts[0] += f" x {format_count(gpus, 'GPU')}{total}"
    if array := job.resources.array:
        parts.append(f"{len(array)} array tasks (checked as task {array[0]})")
    if job.command is None and job.resources.time_limit is not None:
        parts.append(format_duration(job.resources.time_limit))
    parts += [f"{name} {options[name]}" for name in ("partition", "account", "qos", "constraint") if options.get(name)]
    return f"{options.get('job-name', job.path.name)}: {', '.join(parts)}"


def _check_allocation(submission: Submission) -> None:
    """Compare the number of ranks with the GPUs that the job requests."""
    job = submission.job
    parallel = submission.parsed.config.parallel if submission.parsed else None
    world_size = parallel.world_size if parallel else job.world_size
    sizes = f" = {describe_sizes(axis_sizes(parallel))}" if parallel else ""
    submission.facts.append(("Ranks", f"{world_size}{sizes}"))
    if job.num_gpus is None or world_size is None or world_size == job.num_gpus:
        return
    gpus = format_count(job.resources.gpus_per_node or 0, "GPU")
    per_node = f"{format_count(job.num_nodes, 'node')} with {gpus} each"
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


def _summary_facts(config: RunConfig, summary: RunSummary, vocabulary: str) -> Iterator[tuple[str, str]]:
    model, length = summary.model, summary.length
    yield (
        "Model",
        f"{model.name}: {model.exact:,} parameters with {model.vocab_size:,} tokens ({vocabulary}), "
        f"{config.precision.dtype}",
    )
    yield "Memory", f"{format_size(summary.memory.total)} on the fullest rank"
    batch, dp = config.batch, config.parallel.dp
    batches = [stage.global_batch for stage in summary.stages]
    batches = batches or [global_batch_size(batch, 0, dp), final_batch_size(batch, dp)]
    ramp = f"{batches[0]:,} to {batches[-1]:,}" if batches[0] != batches[-1] else f"{batches[-1]:,}"
    load = Path(config.checkpoint.load) if config.checkpoint.load else None
    resumed = latest_iteration(load) if load and load.is_dir() and os.access(load, os.R_OK | os.X_OK) else None
    start = f"; resumes after iteration {resumed:,}" if resumed else ""
    size = f"{length.iterations:,} iterations of batch {ramp}, {length.samples:,} samples, {length.tokens:,} tokens"
    if config.awaits_epochs:
        size = f"{format_count(config.tuning.epochs, 'epoch')} of batch {ramp}; the job counts their iterations"
    yield "Run", f"{size}{start}"
