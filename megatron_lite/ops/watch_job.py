"""State of a run's job: from the lock, exit_status.json, the chain and Slurm's queue; works without Slurm as well."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.chain_state import COMPLETE, ENDING, STOPPED_BY_USER, Chain, read_chain
from megatron_lite.ops.slurm import QueuedJob
from megatron_lite.runs.exit_status import ROLLED_BACK, ExitStatus, completed_iteration, read_exit_status
from megatron_lite.runs.lock_file import LockState, read_lock
from megatron_lite.runs.process import is_running, is_stopped

State = Literal[
    "running", "starting", "paused", "busy", "queued", "waiting", "completed", "stopped", "killed", "empty", "missing"
]
STATES = {
    "running": "a job trains",
    "starting": "a job has started and does not train yet",
    "paused": "the job's process is stopped, as by Ctrl-Z",
    "busy": "another command holds the folder's lock, as `megatron-lite rollback`",
    "queued": "a job is in Slurm's queue",
    "waiting": "the next job of a chain waits for the end of another, or for its start time",
    "completed": "the run is complete",
    "stopped": "the last job ended and wrote exit_status.json, or `megatron-lite rollback` did",
    "killed": "the last job ended without writing exit_status.json",
    "empty": "the folder holds no run",
    "missing": "the folder does not exist",
}
ACTIVE = ("running", "starting", "paused", "busy", "queued", "waiting")
QUEUE_SECONDS = 30.0
"""Seconds between two calls of squeue: clusters ask their users not to poll it."""
_RESUMED = ("time_limit", "signal", ROLLED_BACK)
"""Exit statuses after which the next task of an array may continue the run."""
_UNFINISHED = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "STOPPED")
"""States of a job in Slurm's records that are not its end."""
_JOB = re.compile(r"Slurm step (\w+)\.")
_WAITS = ("Dependency", "BeginTime", "JobHeldUser", "JobHeldAdmin")


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """State of a run's job.

    Attributes:
        state: see STATES.
        reason: one line: where it runs, why it waits, why it ended.
        wanted: whether a run in this state is expected to continue; False after its end, or if somebody stopped it.
        queued: the job in Slurm's queue.
        next: the job that waits for its end.
        lock: the folder's lock; None: it is free.
        since: when the job that holds the lock took it, in seconds since 1970; 0: the lock is free.
        ended: time of exit_status.json, ISO 8601; empty: there is none.
        queue_problem: why Slurm's queue is unknown; empty: it is known, or there is no Slurm.
    """

    state: State
    reason: str
    wanted: bool = True
    queued: QueuedJob | None = None
    next: QueuedJob | None = None
    lock: LockState | None = None
    since: float = 0.0
    ended: str = ""
    queue_problem: str = ""


class Queue:
    """Slurm's queue, asked at most every QUEUE_SECONDS.

    Args:
        clock: seconds from any origin; injected by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[frozenset[str], tuple[float, tuple[QueuedJob, ...], str]] = {}
        self._ends: dict[str, str | None] = {}

    def jobs(self, numbers: Sequence[str], comment: str) -> tuple[list[QueuedJob], str]:
        """Return the queued jobs with one of these numbers or with this comment, and why the queue is unknown.

        Args:
            numbers: of jobs.
            comment: of sbatch --comment; empty: none is looked for.
        """
        own, problem = self._ask(frozenset())
        found = [job for job in own if job.is_one_of(numbers) or (comment and job.comment == comment)]
        missing = frozenset(number for number in numbers if not any(job.is_one_of([number]) for job in found))
        if missing and not problem and slurm.is_installed():
            others, problem = self._ask(missing)  # of another user
            found += others
        return found, problem

    def end_of(self, job: str) -> str | None:
        """Return how a job ended, as Slurm says; None: it has no record, or the job has not ended."""
        if job not in self._ends:
            state = slurm.final_state(job) if slurm.is_installed() else None
            if state in _UNFINISHED:
                return None
            self._ends[job] = state
        return self._ends[job]

    def _ask(self, numbers: frozenset[str]) -> tuple[tuple[QueuedJob, ...], str]:
        if not slurm.is_installed():
            return (), ""
        now = self._clock()
        if numbers not in self._asked or now - self._asked[numbers][0] >= QUEUE_SECONDS:
            try:
                answer = tuple(slurm.queued_jobs(sorted(numbers))), ""
            except ConfigError as error:
                # The programs without a cluster, as on a laptop.
                answer = (), "" if "configuration source" in error.problem else error.problem
            self._asked[numbers] = (now, *answer)
        return self._asked[numbers][1:]


def run_comment(folder: Path) -> str:
    """Return the text of sbatch --comment by which the jobs of a run are found while they are queued."""
    return f"megatron-lite {folder.absolute()}"


def folder_user(folder: Path, queue: Queue, now: float) -> LockState | None:
    """Return the lock of a run's folder if its owner seems to run; None: the folder is free.

    Args:
        folder: the --save folder.
        queue: Slurm's queue.
        now: seconds since 1970.
    """
    lock = read_lock(folder)
    if lock is None:
        return None
    queued, problem = queue.jobs([lock.owner.process.slurm_job], "") if lock.owner.process.slurm_job else ([], "")
    in_use = _is_in_use(folder, lock, read_exit_status(folder), queue, None if problem else queued, now)
    return lock if in_use else None


def _is_in_use(
    folder: Path,
    lock: LockState,
    status: ExitStatus | None,
    queue: Queue,
    queued: Sequence[QueuedJob] | None,
    now: float,
) -> bool:
    """Return whether the owner of a lock seems to run.

    The heartbeat of a process that was killed on another machine stays recent for two minutes, so an exit status that
    is newer than the lock, and Slurm's queue, take precedence over it.
    """
    if not lock.is_held(now):
        return False
    if is_running(lock.owner.process):
        return True
    if status is not None and _seconds(status.time) >= _seconds(lock.owner.since):
        return False
    job = lock.owner.process.slurm_job
    if not job or queued is None or not slurm.is_installed() or any(entry.is_one_of([job]) for entry in queued):
        return True
    # Clusters may hide other users' jobs from squeue; Slurm's record of the end is required for these.
    return queue.end_of(job) is None and folder.stat().st_uid != os.getuid()


def job_status(folder: Path, queue: Queue, *, last_record: float, jobs: Sequence[str] = (), now: float) -> JobStatus:
    """Return the state of the job of a run.

    Args:
        folder: the --save folder.
        queue: Slurm's queue.
        last_record: time of the newest record of metrics.jsonl, in seconds since 1970; 0: there is none.
        jobs: numbers of further Slurm jobs of the run.
        now: seconds since 1970.
    """
    lock, status, chain = read_lock(folder), read_exit_status(folder), _chain(folder)
    numbers = _numbers(lock, status, chain, jobs)
    queued, problem = queue.jobs(numbers, run_comment(folder))
    in_use = lock is not None and _is_in_use(folder, lock, status, queue, None if problem else queued, now)
    # The tasks of an array share the comment, and --job holds for all runs, although each may train a run of its own.
    is_over = lock is not None or (status.status not in _RESUMED if status is not None else last_record > 0)
    if is_over or completed_iteration(folder) is not None:
        own = _numbers(lock, status, chain, ())
        queued = [job for job in queued if not job.is_array_task or job.is_one_of(own)]
    active = next((job for job in queued if job.state != "PENDING"), None)
    pending = next((job for job in queued if job.state == "PENDING"), None)

    since = _seconds(lock.owner.since) if lock is not None else 0.0

    def made(state: State, reason: str, *, wanted: bool = True) -> JobStatus:
        return JobStatus(
            state=state,
            reason=reason,
            wanted=wanted,
            queued=active or pending,
            next=pending if active is not None else None,
            lock=lock,
            since=since,
            ended=status.time if status is not None else "",
            queue_problem=problem,
        )

    if lock is not None and in_use:
        return made(*_of_lock(lock, trained=last_record >= since))
    last = f"; the last job: {status.status}: {status.message}" if status is not None else ""
    if active is not None:
        verb = "starts or ends" if active.state == "RUNNING" else f"is {active.state.lower()}"
        return made("starting", f"job {active.job} {verb} on {active.nodes or 'its nodes'}{last}")
    if pending is not None:
        state: State = "waiting" if pending.reason in _WAITS else "queued"
        return made(state, f"job {pending.job} is pending ({pending.reason}){last}")
    if (iteration := completed_iteration(folder)) is not None:
        return made("completed", f"complete at iteration {iteration:,}", wanted=False)
    if chain is not None and chain.state == "stopped":
        reason = chain.reason if status is None or status.message in chain.reason else f"{chain.reason}{last}"
        by_user = chain.reason == STOPPED_BY_USER or (status is not None and status.status in ENDING)
        return made("stopped", f"the chain is stopped: {reason}", wanted=not by_user)
    if status is not None:
        state = "completed" if status.status in COMPLETE else "stopped"
        where = f" on {status.host}, rank {status.rank}" if status.rank is not None else ""
        return made(
            state, f"{status.status}{where}: {status.message}", wanted=status.status not in (*COMPLETE, *ENDING)
        )
    return _without_exit_status(folder, lock, numbers, queue, made)


def _seconds(time_text: str) -> float:
    try:
        return datetime.fromisoformat(time_text).timestamp()
    except ValueError:
        return 0.0


def _of_lock(lock: LockState, *, trained: bool) -> tuple[State, str]:
    owner = lock.owner
    if owner.command != "train":
        return "busy", f"{owner.command} runs: {owner.process}, since {owner.since}"
    if is_stopped(owner.process):
        return "paused", f"{owner.process} is stopped (SIGSTOP): continue it with kill -CONT"
    return "running" if trained else "starting", f"{owner.process}, since {owner.since}"


def _without_exit_status(
    folder: Path, lock: LockState | None, numbers: Sequence[str], queue: Queue, made: Callable[..., JobStatus]
) -> JobStatus:
    if not folder.is_dir():
        return made("missing", "the folder does not exist; the first job of a run creates its --save folder")
    if lock is not None:
        end = queue.end_of(lock.owner.process.slurm_job) if lock.owner.process.slurm_job else None
        slurms = f", and Slurm says {end}" if end else ""
        return made("killed", f"{lock.owner.process} ended without writing exit_status.json{slurms}")
    if any(folder.glob("iter_*")) or any(folder.glob("metrics.jsonl")):
        ends = [f"Slurm says of job {job}: {end}" for job in numbers[-1:] if (end := queue.end_of(job))]
        return made("killed", "; ".join(["the last job ended without writing exit_status.json", *ends]))
    return made("empty", "the folder holds neither checkpoints nor metrics")


def _chain(folder: Path) -> Chain | None:
    try:
        return read_chain(folder)
    except ConfigError:  # damaged: `slurm status` says so
        return None


def _numbers(
    lock: LockState | None, status: ExitStatus | None, chain: Chain | None, jobs: Sequence[str]
) -> tuple[str, ...]:
    found = [*jobs]
    if status is not None and (match := _JOB.match(status.job)):
        found.append(match[1])
    if lock is not None:
        found.append(lock.owner.process.slurm_job)
    if chain is not None and chain.state == "active":
        found += [chain.job.job, chain.successor]
    return tuple(dict.fromkeys(number for number in found if number))
