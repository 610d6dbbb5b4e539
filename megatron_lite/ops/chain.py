"""Job chain: Slurm jobs submitted one after the other until a run is complete.

Each job submits its successor when it begins, dependent on its own end (`afterany`). Whatever ends the job, the next
one starts: no code has to run at the end. A job that Slurm requeues keeps its successor. The end of a job is judged by
exit_status.json: a complete run cancels the successor; repeated failures without progress delay it, then end the chain.
`chain.json` in the run's --save folder holds the state.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from megatron_lite.errors import ConfigError
from megatron_lite.ops import slurm
from megatron_lite.ops.exclude import exclude_option
from megatron_lite.ops.job import read_resources
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.catalog import latest_iteration
from megatron_lite.runs.exit_status import ExitStatus, completed_iteration, read_exit_status

CHAIN_NAME = "chain.json"
SCRIPT_NAME = "chain.slurm"
FINAL = ("completed", "evaluated", "kill_switch", "exit_flag")
"""Values of exit_status.json after which no further job is wanted."""
MAX_FAILURES = 3
"""Failures in a row at the same saved iteration after which the chain stops."""
BACKOFF_MINUTES = 2
"""Delay of the successor after a failure, doubled with each further one."""
HOST_FAILURES = 2
"""Failures that began on one host after which its node is excluded."""


@dataclass(frozen=True)
class Start:
    """One start of a job; a job that Slurm requeues starts again under its number.

    Attributes:
        job: number of the job.
        restart: how often it was requeued before.
    """

    job: str
    restart: int = 0

    def __str__(self) -> str:
        return f"{self.job}, restart {self.restart}" if self.restart else self.job


@dataclass(frozen=True)
class Outcome:
    """The end of one start of a job.

    Attributes:
        start: the job and its restart, as text.
        status: of exit_status.json; "killed": it wrote none.
        message: the error, or how the job ended.
        iteration: the checkpoint from which the next job resumes; 0: there is none.
        host: on which an error occurred first.
        time: UTC, ISO 8601.
    """

    start: str
    status: str
    message: str
    iteration: int
    host: str
    time: str

    @property
    def failed(self) -> bool:
        """Whether the job did not end as planned."""
        return self.status in ("error", "killed")


@dataclass(frozen=True)
class Chain:
    """Content of chain.json.

    Attributes:
        script: the user's job script, absolute.
        arguments: of the script.
        options: of sbatch.
        state: active; completed; stopped, for `reason`.
        reason: why the chain ended.
        job: the job that runs or ran last, with its restart.
        successor: the job that waits for its end.
        outcomes: of earlier jobs, oldest first.
        excluded: nodes on which no further job runs.
    """

    script: str
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    state: Literal["active", "completed", "stopped"] = "active"
    reason: str = ""
    job: Start = Start("")
    successor: str = ""
    outcomes: tuple[Outcome, ...] = ()
    excluded: tuple[str, ...] = field(default=())

    @property
    def failures(self) -> int:
        """Number of failures in a row, the last ones, at the same saved iteration."""
        count = 0
        for outcome in reversed(self.outcomes):
            if not outcome.failed or outcome.iteration != self.outcomes[-1].iteration:
                break
            count += 1
        return count


def read_chain(folder: Path) -> Chain | None:
    """Return the chain of a run; None: it has none.

    Raises:
        ConfigError: chain.json is damaged.
    """
    path = folder / CHAIN_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        outcomes = tuple(Outcome(**outcome) for outcome in content.pop("outcomes"))
        for name in ("arguments", "options", "excluded"):
            content[name] = tuple(content[name])
        return Chain(**content | {"job": Start(**content["job"])}, outcomes=outcomes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}", fix=f"Remove {path} and submit the job again") from error


def start_chain(folder: Path, script: Path, arguments: Sequence[str], options: Sequence[str]) -> str:
    """Submit the first job of a chain; return its number.

    Raises:
        ConfigError: a chain for this run is in the queue, or sbatch refuses the job.
    """
    old = read_chain(folder)
    if old is not None and old.state == "active":
        for job in (old.job.job, old.successor):
            if job and (state := slurm.job_state(job)) is not None:
                raise ConfigError(
                    f"A chain for --save {folder} is active: job {job} is {state.lower()}",
                    rule="One chain at a time may work on a run",
                    fix=f"End it with `megatron-lite slurm stop {folder}`, or give another --save folder",
                )
    folder.mkdir(parents=True, exist_ok=True)
    chain = Chain(str(script.absolute()), tuple(arguments), tuple(options))
    (folder / SCRIPT_NAME).write_text(_batch_script(folder, chain), encoding="utf-8")
    job = _submit(folder, chain)
    _write(folder, chain)
    return job


def begin_job(folder: Path, start: Start) -> tuple[Chain, bool]:
    """Record the start of a job and submit its successor; return whether the job is to train.

    A restart of the same job, after Slurm requeued it, keeps the successor that waits for it.
    """
    chain = existing_chain(folder)
    if chain.job.job:
        chain = _judge(chain, folder, chain.job)
    if chain.job.job != start.job:
        chain = replace(chain, successor="")
    chain = replace(chain, job=start)
    if chain.state == "active" and (not chain.successor or slurm.job_state(chain.successor) is None):
        chain = replace(chain, successor=_submit(folder, chain, after=start.job))
    _write(folder, chain)
    return chain, chain.state == "active"


def end_job(folder: Path, start: Start) -> Chain:
    """Judge the end of a job: cancel, delay or leave its successor.

    It runs after the job's script, and not at all where the job was killed: then the successor judges.
    """
    chain = _judge(existing_chain(folder), folder, start)
    if chain.state != "active":
        if chain.successor:
            slurm.cancel(chain.successor)
    elif chain.outcomes and chain.outcomes[-1].failed:
        changes = [f"StartTime=now+{_backoff_minutes(chain)}minutes"]
        if excluded := _excluded(folder, chain):
            changes.append(f"ExcNodeList={excluded}")
        slurm.call("scontrol", "update", f"JobId={chain.successor}", *changes)
    _write(folder, chain)
    return chain


def stop_chain(folder: Path) -> Chain:
    """Cancel the jobs of a chain, the successor first."""
    chain = replace(existing_chain(folder), state="stopped", reason="slurm stop")
    _write(folder, chain)
    for job in (chain.successor, chain.job.job):
        if job:
            slurm.cancel(job)
    return chain


def existing_chain(folder: Path) -> Chain:
    """Return the chain of a run.

    Raises:
        ConfigError: it has none, or chain.json is damaged.
    """
    chain = read_chain(folder)
    if chain is None:
        raise ConfigError(
            f"{folder} has no chain ({CHAIN_NAME})", fix="Start one with `megatron-lite slurm submit --chain`"
        )
    return chain


def _judge(chain: Chain, folder: Path, start: Start) -> Chain:
    """Add the outcome of a start, unless it is known, and decide whether the chain goes on."""
    if chain.state != "active" or any(outcome.start == str(start) for outcome in chain.outcomes):
        return chain
    outcome = _outcome(folder, start)
    chain = replace(chain, outcomes=(*chain.outcomes, outcome))
    if outcome.status in FINAL or completed_iteration(folder) is not None:
        return replace(chain, state="completed", reason=outcome.message)
    if outcome.failed:
        on_host = sum(earlier.failed and earlier.host == outcome.host for earlier in chain.outcomes)
        if outcome.host and on_host >= HOST_FAILURES and outcome.host not in chain.excluded:
            chain = replace(chain, excluded=(*chain.excluded, outcome.host))
        if chain.failures >= MAX_FAILURES:
            reason = (
                f"{chain.failures} failures in a row at iteration {outcome.iteration:,}; the last: {outcome.message}"
            )
            return replace(chain, state="stopped", reason=reason)
    return chain


def _outcome(folder: Path, start: Start) -> Outcome:
    status = read_exit_status(folder)
    saved = latest_iteration(folder) or 0
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # The file of an earlier start stays if this one was killed before it began to train.
    if status is None or not _is_of_start(status, start):
        return Outcome(str(start), "killed", "the job ended without writing exit_status.json", saved, "", now)
    host = status.host if status.status == "error" else ""
    return Outcome(str(start), status.status, status.message, saved, host, now)


def _is_of_start(status: ExitStatus, start: Start) -> bool:
    """Return whether a start of a job wrote an exit status; under torchrun the file does not name the job."""
    match = re.match(r"Slurm step (\w+)\.\d+, restart (\d+)", status.job)
    return match is None or (match[1], int(match[2])) == (start.job, start.restart)


def _backoff_minutes(chain: Chain) -> int:
    return BACKOFF_MINUTES * 2 ** max(0, chain.failures - 1)


def _submit(folder: Path, chain: Chain, *, after: str = "") -> str:
    options = list(chain.options)
    if after:
        options.append(f"--dependency=afterany:{after}")
    if chain.failures:
        options.append(f"--begin=now+{_backoff_minutes(chain)}minutes")
    if excluded := _excluded(folder, chain):
        options.append(f"--exclude={excluded}")
    return slurm.submit(options, str(folder.absolute() / SCRIPT_NAME))


def _excluded(folder: Path, chain: Chain) -> str:
    """Return the hosts for --exclude: the user's, the chain's and those of the exclude file."""
    own = read_resources((folder / SCRIPT_NAME).read_text(encoding="utf-8"), chain.options)[0].options.get(
        "exclude", ""
    )
    try:
        return exclude_option(folder, given=own, further=chain.excluded)
    except ConfigError as error:  # a line written by hand must not end the chain
        print(f"WARNING: {error}", file=sys.stderr, flush=True)
        return ",".join(filter(None, (own, *chain.excluded)))


def _batch_script(folder: Path, chain: Chain) -> str:
    """Return the script of each job: the user's #SBATCH lines, `slurm begin`, the user's script, `slurm end`."""
    lines = Path(chain.script).read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines[1:] if lines[:1] and lines[0].startswith("#!") else lines:
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            header.append(line)
    program = f"{shlex.quote(sys.executable)} -m megatron_lite slurm"
    run = shlex.quote(str(folder.absolute()))
    command = shlex.join(["bash", chain.script, *chain.arguments])
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by `megatron-lite slurm submit --chain` for {chain.script}.",
            *header,
            "#SBATCH --open-mode=append",
            f"{program} begin {run} || exit 0",
            f"{command} &",
            "child=$!",
            "# Signals that Slurm sends to the batch shell (--signal=B:USR1@600) are meant for the script.",
            'for name in USR1 USR2 TERM INT HUP; do trap "kill -$name $child 2>/dev/null" "$name"; done',
            'while :; do wait "$child"; code=$?; kill -0 "$child" 2>/dev/null || break; done',
            f"{program} end {run}",
            'exit "$code"',
            "",
        ]
    )


def _write(folder: Path, chain: Chain) -> None:
    replace_file(folder / CHAIN_NAME, (json.dumps(asdict(chain), indent=2) + "\n").encode())
