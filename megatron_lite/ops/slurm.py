"""Calls of Slurm's programs: sbatch, squeue, sacct, scontrol and scancel; parsing of their output."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from megatron_lite.errors import ConfigError

ATTEMPTS = 5
"""Calls while slurmctld does not answer, with doubled pauses from one second."""
UNREACHABLE = re.compile(
    r"Unable to contact|Socket timed out|Connection refused|temporarily unable|Zero Bytes were|standby mode",
    re.IGNORECASE,
)

_QUEUE_FORMAT = "%i|%A|%T|%r|%S|%e|%N|%k|%j"
"""Fields of squeue; the name is the last, because it may contain the separator."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in Slurm's queue.

    Attributes:
        job: its number; of an array task, that of the array and the task's index: 8_3, or 8_[1-3] for several.
        state: PENDING, RUNNING, COMPLETING, …
        reason: why it is pending: Priority, Resources, Dependency, BeginTime, …; "None" while it runs.
        start: when it started, or Slurm's estimate, in seconds since 1970; None: unknown.
        end: when it reaches its time limit, in seconds since 1970; None: unknown.
        nodes: its nodes, as n[1-4]; empty while it is pending.
        comment: text given with sbatch --comment.
        name: the job's name.
        number: the value of SLURM_JOB_ID in the job; differs from `job` for an array task.
    """

    job: str
    state: str
    reason: str = ""
    start: float | None = None
    end: float | None = None
    nodes: str = ""
    comment: str = ""
    name: str = ""
    number: str = ""

    @property
    def is_array_task(self) -> bool:
        """Return whether the job is a task of a job array."""
        return "_" in self.job

    def is_one_of(self, numbers: Collection[str]) -> bool:
        """Return whether the job's number is among `numbers`, in either notation."""
        # Pending tasks that are listed together, 8_[1-3], have the array's number; so has one task that ran.
        return self.job in numbers or ("[" not in self.job and self.number in numbers)


def call(*command: str, pause: float = 1.0, attempts: int = ATTEMPTS) -> str:
    """Run one of Slurm's programs and return its output.

    Args:
        command: program and arguments.
        pause: seconds before the second attempt, doubled with each further one.
        attempts: calls while the controller does not answer.

    Raises:
        ConfigError: it is not installed, refuses, or the controller does not answer.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]} is not installed here", fix="Run this on a node of the Slurm cluster, or pass --dry-run"
        )
    for attempt in range(attempts):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if not done.returncode or not UNREACHABLE.search(done.stderr):
            break
        if attempt < attempts - 1:
            time.sleep(pause * 2**attempt)
    if done.returncode:
        # The cause may be in any line: the last one is often only a reference to --help.
        lines = [
            line.strip().removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.split("\n")
        ]
        reason = "; ".join(dict.fromkeys(filter(None, lines))) or f"exit code {done.returncode}"
        fix = (
            "Wait until the controller answers (`scontrol ping`), then give the command again"
            if UNREACHABLE.search(done.stderr)
            else f"Correct what this names; the command was: {shlex.join(command)}"
        )
        raise ConfigError(f"{command[0]} failed: {reason}", fix=fix)
    return done.stdout


def is_installed() -> bool:
    """Return whether Slurm's programs are on this machine."""
    return shutil.which("squeue") is not None


def submit(options: Sequence[str], script: str, arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; return the number of the job."""
    return call("sbatch", "--parsable", *options, script, *arguments).strip().split(";")[0]


def job_state(job: str) -> str | None:
    """Return the state of a job in the queue, as PENDING or RUNNING; None: it is not in the queue."""
    try:
        return call("squeue", "-h", "-j", job, "-o", "%T").strip() or None
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def node_names(partition: str = "") -> frozenset[str]:
    """Return the names of the nodes of a partition, or of the cluster; none if Slurm does not answer."""
    try:
        return frozenset(call("sinfo", "-h", "-N", *(["-p", partition] if partition else []), "-o", "%N").split())
    except ConfigError:
        return frozenset()


def queued_jobs(jobs: Sequence[str] = ()) -> list[QueuedJob]:
    """Return jobs that are in the queue, with one call of squeue.

    Args:
        jobs: numbers of the jobs; those that have ended are left out. Empty: all jobs of this user.

    Raises:
        ConfigError: squeue is not installed, or the controller does not answer.
    """
    which = ["-j", ",".join(jobs)] if jobs else ["--me"]
    try:
        return read_queue(call("squeue", "-h", *which, "-o", _QUEUE_FORMAT, attempts=1))
    except ConfigError as error:
        if "Invalid job id" in str(error):  # the only job asked for has ended
            return []
        raise


def read_queue(text: str) -> list[QueuedJob]:
    """Return the jobs in the output of squeue -h -o _QUEUE_FORMAT."""
    found = []
    for line in text.splitlines():
        if line.count("|") >= 8:
            job, number, state, reason, start, end, nodes, comment, name = line.split("|", 8)
            comment = comment.replace("(null)", "")
            found.append(
                QueuedJob(job, state, reason, _read_time(start), _read_time(end), nodes, comment, name, number)
            )
    return found


def final_state(job: str) -> str | None:
    """Return how a job ended: COMPLETED, TIMEOUT, CANCELLED, NODE_FAIL, OUT_OF_MEMORY, …; None: Slurm has no record."""
    for command, pattern in (
        (("sacct", "-n", "-X", "-P", "-j", job, "-o", "State"), r"([A-Z_]+)"),
        (("scontrol", "show", "job", "-o", job), r"JobState=([A-Z_]+)"),
    ):
        try:
            found = re.findall(pattern, call(*command, attempts=1))
        except ConfigError:  # sacct: accounting is off; scontrol: a job that ended long ago
            continue
        if found:
            return found[-1]
    return None


def _read_time(text: str) -> float | None:
    """Return Slurm's local time as seconds since 1970; None: N/A or Unknown."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def cancel(job: str) -> None:
    """Cancel a job; one that has ended is left as it is."""
    if job_state(job) is not None:
        call("scancel", job)
