"""Job chain: Slurm jobs submitted one after the other until a run is complete.

Each job submits its successor when it begins, dependent on its own end (`--dependency=afterany`). Of the ways to build
a chain, this one survives most failures:

- Self-resubmission at the end of a job does not happen if the job is killed: time limit, failed node, preemption.
- `--dependency=singleton` orders jobs by name and user: two runs of one name wait for each other.
- `scontrol requeue` needs a live job, and some clusters disable it. Slurm's own requeue, after a failed node or a
  preemption, keeps job and successor: `afterany` is not satisfied by it. A job that cannot submit another one (limit
  on submitted jobs, no sbatch on compute nodes) requeues itself at its end.

A job is judged by exit_status.json when its script has ended, or by its successor if it was killed. A complete run
cancels the successor. A failure delays it; repeated failures without a new checkpoint end the chain. `chain.json` in
the run's --save folder holds the state; it is changed under a lock. A job that is not the chain's does not train.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.chain_checks import jobs_in_queue, queue_problems
from megatron_lite.ops.chain_script import SCRIPT_NAME, write_scripts
from megatron_lite.ops.chain_state import (
    CHAIN_NAME,
    STOPPED_BY_USER,
    Chain,
    Start,
    add_outcome,
    backoff_minutes,
    existing_chain,
    locked,
    outcome_of,
    read_chain,
    write_chain,
)
from megatron_lite.ops.exclude import exclude_option
from megatron_lite.ops.resources import read_resources, without_option
from megatron_lite.runs.exit_status import read_exit_status
from megatron_lite.runs.lock_file import read_owner
from megatron_lite.runs.process import is_running

TRAINING_END_SECONDS = 60.0
"""Time for which the end of a script waits for the end of training: a signal may end the script first."""


def start_chain(folder: Path, script: Path, arguments: Sequence[str], options: Sequence[str]) -> str:
    """Submit the first job of a chain; return its number.

    Args:
        folder: the --save folder of the run.
        script: the user's job script; the chain's jobs run a copy of it, as sbatch does.
        arguments: of the script.
        options: of sbatch.

    Raises:
        ConfigError: a job of this run is in the queue, or sbatch refuses the script.
    """
    dependency = read_resources(script.read_text(encoding="utf-8"), options)[0].options.get("dependency", "")
    with locked(folder):
        # Checked before the submission as well; another one may have been faster.
        for problem in queue_problems(folder, chain=True, dependency=dependency):
            raise problem
        old = read_chain(folder)
        chain = Chain(str(script.absolute()), tuple(arguments), tuple(options))
        write_scripts(folder, script, arguments)
        # Written before the job exists: a job of a chain that was not recorded would not train.
        write_chain(folder, chain)
        try:
            job = _submit(folder, chain)
        except ConfigError:
            if old is None:
                (folder / CHAIN_NAME).unlink()
            else:
                write_chain(folder, old)
            raise
        write_chain(folder, replace(chain, successor=job))
    return job


def begin_job(folder: Path, start: Start) -> tuple[Chain, str]:
    """Record the start of a job and submit its successor.

    A job that Slurm has requeued keeps the successor that waits for its end. A successor that cannot be submitted does
    not prevent the training: the end of the job tries again.

    Returns:
        The chain, and why the job must not train; empty: it trains.
    """
    with locked(folder, start):
        chain = existing_chain(folder)
        if chain.state == "active" and (foreign := _refuse_foreign(chain, start)):
            return chain, foreign
        if chain.state == "active" and chain.job.job and chain.job != start:
            requeued = chain.job.job == start.job
            chain = write_chain(folder, _judged(chain, folder, chain.job, requeued=requeued))
        if chain.state != "active":
            return chain, f"the chain is {chain.state}: {chain.reason}"
        if chain.job.job != start.job:
            chain = replace(chain, successor="")
        exit_status = read_exit_status(folder)
        earlier_exit = exit_status.time if exit_status is not None else ""
        # Written first: with no room for it, there must be no successor either, which would fail in the same way.
        chain = write_chain(folder, replace(chain, job=start, warning="", earlier_exit=earlier_exit))
        try:
            if not chain.successor or slurm.job_state(chain.successor) is None:
                chain = replace(chain, successor="")
                chain = replace(chain, successor=_submit(folder, chain, after=start.job))
        except ConfigError as error:
            chain = replace(chain, warning=f"the next job is not submitted yet: {error.problem}")
        return write_chain(folder, chain), ""


def end_job(folder: Path, start: Start, exit_code: int = 0) -> Chain:
    """Judge a job whose script has ended; cancel, delay or keep its successor.

    A job that was killed does not call this function: its successor judges it.

    Args:
        folder: the --save folder of the run.
        start: the job and its restart.
        exit_code: of the script.
    """
    _wait_for_training(folder, start)
    with locked(folder, start):
        how = f"the job script ended with exit code {exit_code}, and the training wrote no exit status"
        chain = write_chain(folder, _judged(existing_chain(folder), folder, start, how=how))
        if chain.state == "active":
            return write_chain(folder, _prepare_successor(folder, chain, start))
        if chain.successor:
            try:
                slurm.cancel(chain.successor)
            except ConfigError as error:  # the successor finds the chain ended, and exits
                print(f"WARNING: {error}", file=sys.stderr, flush=True)
        return chain


def settled_chain(folder: Path, queue: Sequence[slurm.QueuedJob]) -> Chain:
    """Return a chain of which no waiting job will judge the last one; its outcome is recorded here.

    A job that was ended by scancel does not call end_job. After the end of the chain, or without a successor, nobody
    else would record how it ended.

    Args:
        folder: the --save folder of the run.
        queue: the chain's jobs in Slurm's queue.
    """
    chain = existing_chain(folder)
    in_queue = {job.job for job in queue}
    if not chain.job.job or chain.job.job in in_queue or (chain.state == "active" and in_queue):
        return chain
    settled = _judged(chain, folder, chain.job)
    if settled.state == "active" and chain.successor and slurm.final_state(chain.successor) == "CANCELLED":
        settled = replace(settled, state="stopped", reason=_without_successor(chain, chain.job))
    if settled != chain:
        # Of another user's run, or on a full disk, the result is shown only.
        with suppress(ConfigError), locked(folder):
            if existing_chain(folder) == chain:
                write_chain(folder, settled)
    return settled


def stop_chain(folder: Path, *, after_current: bool = False) -> Chain:
    """Cancel the jobs of a chain, the waiting one first.

    Args:
        folder: the --save folder of the run.
        after_current: let the running job finish.
    """
    existing_chain(folder)  # the lock would create the folder
    with locked(folder):
        chain = existing_chain(folder)
        if chain.state == "active":
            chain = write_chain(folder, replace(chain, state="stopped", reason=STOPPED_BY_USER))
        for job in (chain.successor, "" if after_current else chain.job.job):
            if job:
                slurm.cancel(job)
    return chain


def _refuse_foreign(chain: Chain, start: Start) -> str:
    """Return why a job is not the chain's, while a job of the chain is in the queue; empty: it is the chain's.

    sbatch may report a timeout for a job that it has submitted; the chain then has another successor.
    """
    if start.job in chain.jobs:
        return ""
    try:
        queued = jobs_in_queue(chain)
    except ConfigError:
        queued = []
    return f"it is not of this chain, whose job {queued[0].job} is {queued[0].state.lower()}" if queued else ""


def _wait_for_training(folder: Path, start: Start) -> None:
    """Wait until the ranks of a job have released the run's lock, or rank 0 has died."""
    deadline = time.monotonic() + TRAINING_END_SECONDS
    while time.monotonic() < deadline:
        owner = read_owner(folder)
        if owner is None or owner.process.slurm_job != start.job or is_running(owner.process) is False:
            return
        time.sleep(0.5)


def _judged(chain: Chain, folder: Path, start: Start, *, how: str = "", requeued: bool = False) -> Chain:
    """Return the chain with the outcome of a start, unless it has the outcome already."""
    if any(outcome.start == str(start) for outcome in chain.outcomes):
        return chain
    return add_outcome(chain, outcome_of(folder, start, earlier_exit=chain.earlier_exit, how=how, requeued=requeued))


def _prepare_successor(folder: Path, chain: Chain, start: Start) -> Chain:
    """Submit a missing successor; delay one after a failure, and exclude nodes from it. Return the new state."""
    if not chain.successor:
        return _submit_late(folder, chain, start)
    try:
        if slurm.job_state(chain.successor) is None:
            return replace(chain, state="stopped", reason=_without_successor(chain, start))
        changes = []
        if chain.outcomes[-1].failed:
            changes.append(f"StartTime=now+{backoff_minutes(chain)}minutes")
        if excluded := _excluded(folder, chain):
            changes.append(f"ExcNodeList={excluded}")
        if changes:
            slurm.call("scontrol", "update", f"JobId={chain.successor}", *changes)
    except ConfigError as error:
        return replace(chain, warning=f"job {chain.successor} is not delayed: {error.problem}")
    return replace(chain, warning="")


def _without_successor(chain: Chain, start: Start) -> str:
    return f"job {chain.successor}, which waited for the end of job {start.job}, was cancelled"


def _submit_late(folder: Path, chain: Chain, start: Start) -> Chain:
    """Submit the successor at the end of a job, or requeue the job itself."""
    try:
        return replace(chain, successor=_submit(folder, chain, after=start.job), warning="")
    except ConfigError as refused:
        # Slurm ends this job at once, and this program with it.
        write_chain(folder, replace(chain, warning=f"job {start.job} was requeued: {refused.problem}"))
        try:
            slurm.call("scontrol", "requeue", start.job)
        except ConfigError as error:
            reason = f"no further job could be submitted ({refused.problem}) and the job not requeued ({error.problem})"
            return replace(chain, state="stopped", reason=reason)
        return existing_chain(folder)


def _submit(folder: Path, chain: Chain, *, after: str = "") -> str:
    options = list(chain.options)
    if after:
        options.append(f"--dependency=afterany:{after}")
    if chain.failures:
        options.append(f"--begin=now+{backoff_minutes(chain)}minutes")
    if excluded := _excluded(folder, chain):
        options = [*without_option(options, "exclude"), f"--exclude={excluded}"]
    return slurm.submit(options, str(folder.absolute() / SCRIPT_NAME))


def _excluded(folder: Path, chain: Chain) -> str:
    """Return the nodes for --exclude: the user's, the chain's and those of the exclude file."""
    script = (folder / SCRIPT_NAME).read_text(encoding="utf-8")
    own = read_resources(script, chain.options)[0].options.get("exclude", "")
    try:
        return exclude_option(folder, given=own, further=chain.excluded)
    except ConfigError as error:  # a line written by hand must not end the chain
        print(f"WARNING: {error}", file=sys.stderr, flush=True)
        return ",".join(filter(None, (own, *chain.excluded)))
