"""Calls of Slurm's programs: sbatch, squeue, scontrol and scancel."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence

from megatron_lite.errors import ConfigError

ATTEMPTS = 5
"""Calls while slurmctld does not answer, with doubled pauses from one second."""
UNREACHABLE = re.compile(r"Unable to contact|Socket timed out|Connection refused|temporarily unable", re.IGNORECASE)


def call(*command: str, pause: float = 1.0) -> str:
    """Run one of Slurm's programs and return its output.

    Raises:
        ConfigError: it is not installed, refuses, or the controller does not answer.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]} is not installed here", fix="Run this on a node of the Slurm cluster, or pass --dry-run"
        )
    for attempt in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if not done.returncode or not UNREACHABLE.search(done.stderr):
            break
        time.sleep(pause * 2**attempt)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ConfigError(f"{' '.join(command[:1])} failed: {reason[0]}", fix=f"Run it by hand: {' '.join(command)}")
    return done.stdout


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


def node_names() -> frozenset[str]:
    """Return the names of the cluster's nodes; none if Slurm does not answer."""
    try:
        return frozenset(call("sinfo", "-h", "-N", "-o", "%N").split())
    except ConfigError:
        return frozenset()


def cancel(job: str) -> None:
    """Cancel a job; one that has ended is left as it is."""
    if job_state(job) is not None:
        call("scancel", job)
