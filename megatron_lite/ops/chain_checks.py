"""Checks of a job before submission: whether it can be chained, and which jobs of its run are in Slurm's queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lite.config.arguments import save_folder
from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.chain_state import Chain, read_chain
from megatron_lite.ops.submission import Submission
from megatron_lite.ops.watch_job import run_comment
from megatron_lite.runs.lock_file import read_owner

RESUME_MARK = "latest_checkpointed_iteration"
"""Name in scripts that choose --load by whether the run has a checkpoint."""


def check_run(submission: Submission, *, chain: bool, ask_slurm: bool) -> None:
    """Add to a submission the reasons why its run cannot take the job, or cannot be chained.

    Args:
        submission: the job, checked by check_job.
        chain: the job is to be the first of a chain.
        ask_slurm: compare with the jobs in the queue; they are unknown away from the cluster.
    """
    if chain:
        submission.problems += _chain_problems(submission)
    save = submission.parsed.config.checkpoint.save if submission.parsed is not None else ""
    if save and ask_slurm:
        dependency = submission.job.resources.options.get("dependency", "")
        submission.problems += queue_problems(submission.job.folder / save, chain=chain, dependency=dependency)


def queue_problems(folder: Path, *, chain: bool, dependency: str = "") -> Iterator[ConfigError]:
    """Yield an error if a job of a run is in the queue beside which another one must not be submitted.

    Args:
        folder: the --save folder of the run.
        chain: a chain is to be submitted, else a single job.
        dependency: value of --dependency: a chain may be submitted to wait for a job of the run.
    """
    try:
        old = read_chain(folder)
        queued = jobs_in_queue(old) if old is not None and (chain or old.state == "active") else []
        if queued:
            kind = "has a chain already" if chain else "has an active chain, which the job would disturb"
            yield ConfigError(
                f"The run {folder} {kind}: job {queued[0].job} is {queued[0].state.lower()}",
                rule="One chain at a time may work on a run, and no other job beside it",
                fix=f"End it with `megatron-lite slurm stop {folder}`, or give another --save folder",
            )
        elif chain:
            yield from _other_jobs(folder, dependency)
    except ConfigError as error:  # Slurm does not answer, or chain.json is damaged
        yield error


def jobs_in_queue(chain: Chain) -> list[slurm.QueuedJob]:
    """Return the jobs of a chain that are in the queue, waiting ones last."""
    jobs = slurm.queued_jobs(chain.jobs) if chain.jobs else []
    return sorted(jobs, key=lambda job: job.state == "PENDING")


def _other_jobs(folder: Path, dependency: str) -> Iterator[ConfigError]:
    """Yield an error for a job of a run that was submitted without --chain, and is pending or running."""
    comment = run_comment(folder)
    states = {job.job.partition("_")[0]: job.state for job in slurm.queued_jobs() if job.comment == comment}
    owner = read_owner(folder)
    trains = owner.process.slurm_job if owner is not None else ""
    if trains and trains not in states and (state := slurm.job_state(trains)):
        states[trains] = state if state != "PENDING" else "COMPLETING"  # requeued: the lock is that of its last start
    waited_for = dependency.replace(",", ":").replace("?", ":").split(":")
    for job, state in states.items():
        if state != "COMPLETING" and job not in waited_for:
            does = f"trains in --save {folder}" if job == trains else f"of the run {folder} is {state.lower()}"
            yield ConfigError(
                f"Slurm job {job} {does}",
                rule="One job at a time may train a run",
                fix=f"Cancel it (scancel {job}), or let the chain wait: --sbatch=--dependency=afterany:{job}",
            )
            return


def _chain_problems(submission: Submission) -> Iterator[ConfigError]:
    """Yield an error for each reason why the jobs after the first one could not resume the run."""
    job, parsed = submission.job, submission.parsed
    if "array" in {name for component in job.components for name in component.options}:
        yield ConfigError(
            f"{job.path} is a job array (--array), which cannot be chained: its tasks would train in one folder",
            fix="Remove --array, and submit one chain per run with a --save folder of its own",
        )
    if job.command is None:
        yield ConfigError(
            f"A chain needs a run folder, and {job.path} starts no training command",
            fix="Submit it without --chain, or start pretrain_gpt.py with --save FOLDER --load FOLDER in it",
        )
    if parsed is None:
        return
    checkpoint = parsed.config.checkpoint
    save, load = checkpoint.save, checkpoint.load
    if not save:
        yield ConfigError(
            f"A chain needs a run folder, and the training command in {job.path} has no --save",
            fix="Add --save FOLDER --load FOLDER, the same folder twice",
        )
        return
    folders = [save, *(save_folder(command.flags) for command in job.further)]
    if len(set(folders)) > 1:
        yield ConfigError(
            f"The script trains several runs (--save {', '.join(dict.fromkeys(folders))}), and a chain continues one",
            fix="Write a script for each run, or pass the folder as an argument, and submit one chain per run",
        )
        return
    rule = "Each job of a chain resumes from the last checkpoint of the one before"
    if RESUME_MARK in job.path.read_text(encoding="utf-8"):
        return  # the script itself chooses what to load
    if not load:
        yield ConfigError(
            f"The command has --save {save} and no --load: the second job of a chain could not resume",
            rule=rule,
            fix=f"Add --load {save}; while the folder is empty, the run starts from new weights",
        )
    elif (job.folder / load).resolve() != (job.folder / save).resolve():
        yield ConfigError(
            f"The command has --load {load} and --save {save}: each job of a chain would begin from --load again",
            rule=rule,
            fix=f"Give --load {save}. To begin from the weights in {load}, submit one job without --chain first",
        )
    else:
        restarts = {
            "--finetune": checkpoint.finetune,
            "--reset-iteration": checkpoint.reset_progress,
            "--load-iteration": checkpoint.load_iteration,
        }
        for flag in [flag for flag, given in restarts.items() if given]:
            yield ConfigError(
                f"{flag} is given: each job of a chain would begin at the same iteration again",
                rule=rule,
                fix=f"Submit one job with {flag} without --chain first, then the chain without {flag}",
            )
