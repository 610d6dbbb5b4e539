"""CLI commands `slurm status` and `slurm stop` of a job chain; `slurm begin` and `end`, which its jobs call."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.cli.standard_output import make_console
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_lite.cli.parser import Parser
    from megatron_lite.ops.chain_state import Chain, Start
    from megatron_lite.ops.slurm import QueuedJob


INTERNAL = ("begin", "end")
"""Commands that the jobs of a chain call, not users."""


def add_commands(commands: argparse._SubParsersAction[Parser], called: str) -> None:
    """Add the commands to the parser of `slurm`; an internal one only if it is called, so that no help offers it."""
    for name, text in (
        ("status", "show the jobs of a run's chain: how they ended, what runs, what waits"),
        ("stop", "cancel the jobs of a run's chain"),
        ("begin", "called by a job of a chain when it begins"),
        ("end", "called by a job of a chain when its script has ended"),
    ):
        if name in INTERNAL and name != called:
            continue
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("run", type=Path, help="the run's --save folder")
        if name == "status":
            command.add_argument("--json", action="store_true", help="print JSON, for programs")
        if name == "end":
            command.add_argument("--exit-code", type=int, default=0, help="exit code of the script")
        if name == "stop":
            command.add_argument(
                "--after-current", action="store_true", help="let the running job finish; cancel the waiting one only"
            )


def run_command(options: argparse.Namespace) -> int:
    """Run one of the commands; return its exit code."""
    from megatron_lite.ops import chain as chains
    from megatron_lite.ops.chain_script import EXIT_ENDED
    from megatron_lite.ops.chain_state import existing_chain

    folder = options.run
    if options.command == "begin":
        start = _current_start()
        chain, refusal = chains.begin_job(folder, start)
        if refusal:
            print(f"Job {start} does not train: {refusal}")
            return EXIT_ENDED
        print(_headline(folder, chain, None), flush=True)
    elif options.command == "end":
        print(_headline(folder, chains.end_job(folder, _current_start(), options.exit_code), None))
    elif options.command == "stop":
        chain = chains.stop_chain(folder, after_current=options.after_current)
        print(_headline(folder, chain, _queue(chain)[0]))
    else:
        chain = existing_chain(folder)
        queue, unknown = _queue(chain)
        if queue is not None:
            chain = chains.settled_chain(folder, queue)
        if options.json:
            print(json.dumps(_as_json(folder, chain, queue), indent=2))
        else:
            _print_status(folder, chain, queue, unknown)
    return 0


def _current_start() -> Start:
    """Return this job's start, and remove the job's variables, which sbatch would export to the next job.

    That job would take SLURM_RESTART_COUNT for its own, since Slurm sets it for requeued jobs only.
    """
    from megatron_lite.ops.chain_state import Start

    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
    if not job:
        raise ConfigError(
            "SLURM_JOB_ID is not set: this is not a Slurm job",
            fix="The jobs of a chain call this command; submit one with `megatron-lite slurm submit --chain JOB.slurm`",
        )
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del os.environ[name]
    return Start(job, int(restarts or 0))


def _queue(chain: Chain) -> tuple[list[QueuedJob] | None, str]:
    """Return the jobs of a chain that are in the queue; None, and the reason, if Slurm does not answer."""
    from megatron_lite.ops import slurm

    try:
        return slurm.queued_jobs(chain.jobs) if chain.jobs else [], ""
    except ConfigError as error:
        return None, error.problem


def _state(chain: Chain, queue: list[QueuedJob] | None) -> str:
    """Return the state of a chain; `interrupted` if it is active and no job of it is in the queue."""
    return "interrupted" if chain.state == "active" and queue == [] else chain.state


def _headline(folder: Path, chain: Chain, queue: list[QueuedJob] | None) -> str:
    state = _state(chain, queue)
    reason = f": {chain.reason}" if chain.reason else ""
    in_queue = {job.job for job in queue or []}
    if state == "interrupted":
        reason = (
            ": none of its jobs is in the queue; they were cancelled, or Slurm has lost them. "
            f"`megatron-lite slurm submit --chain {chain.script}` starts a new chain, which resumes the run"
        )
    elif state == "active" and queue is None:
        jobs = [("last started: job", str(chain.job)), ("next: job", chain.successor)]
        reason = "".join(f"; {text} {job}" for text, job in jobs if job)
    elif chain.job.job in in_queue and chain.successor not in in_queue and (chain.successor or state != "active"):
        ended = f": job {chain.successor}, which waited for its end, is not in the queue" if state == "active" else ""
        reason += f"; no job follows job {chain.job}{ended}"
    warning = f"\nWarning: {chain.warning}" if chain.warning and state == "active" else ""
    return f"Chain of {folder}: {state}{reason}{warning}"


def _as_json(folder: Path, chain: Chain, queue: list[QueuedJob] | None) -> dict[str, object]:
    from megatron_lite.ops.chain_script import script_changed

    return {
        **asdict(chain),
        "state": _state(chain, queue),
        "failures": chain.failures,
        "script_changed": script_changed(folder, chain.script),
        "queue": None if queue is None else [asdict(job) for job in queue],
    }


def _print_status(folder: Path, chain: Chain, queue: list[QueuedJob] | None, unknown: str) -> None:

    from megatron_lite.ops.chain_script import COPY_NAME, script_changed

    print(_headline(folder, chain, queue))
    if queue is None:
        print(f"The queue is unknown: {unknown}")
    if chain.state == "active" and script_changed(folder, chain.script):
        print(
            f"{chain.script} has changed since the chain began; its jobs run the copy {folder / COPY_NAME}. To use the "
            f"new script: `megatron-lite slurm stop {folder}`, then submit it"
        )
    if chain.excluded:
        print(f"Excluded after failures: {', '.join(chain.excluded)}")
    if chain.outcomes or queue:
        make_console(highlight=False, markup=False).print(_table(chain, queue or []))


def _table(chain: Chain, queue: list[QueuedJob]) -> Table:
    """Return one row for each start of a job that has ended, and one for each job in the queue."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("job", "state", "time", "saved", "host", "message"):
        table.add_column(column, overflow="fold", justify="right" if column == "saved" else "left")
    for past in chain.outcomes:
        ended = _local(datetime.fromisoformat(past.time).timestamp())
        table.add_row(past.start, past.status, ended, f"{past.iteration:,}", past.host, past.message)
    for job in sorted(queue, key=lambda job: job.state == "PENDING"):
        number = str(chain.job) if job.job == chain.job.job else job.job
        if job.state == "PENDING":
            estimate = f"starts about {_local(job.start)}" if job.start else "no start estimate"
            reason = f" ({_pending_reason(job)})" if job.reason != "None" else ""  # Slurm has not looked at it yet
            table.add_row(number, "pending", "", "", "", estimate + reason)
        else:
            until = f"until {_local(job.end)} at most" if job.end else ""
            table.add_row(number, job.state.lower(), _local(job.start) if job.start else "", "", job.nodes, until)
    return table


def _pending_reason(job: QueuedJob) -> str:
    """Return why a job is pending, with what to do about a job that is held."""
    if job.reason in ("JobHeldUser", "JobHeldAdmin") or "held" in job.reason:
        return f"{job.reason}: scontrol release {job.job}"
    return "waits for the end of the job before" if job.reason == "Dependency" else job.reason


def _local(seconds: float) -> str:
    """Return a time in this machine's time zone, without the year."""
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().strftime("%m-%d %H:%M")
