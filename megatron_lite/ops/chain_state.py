"""State of a Slurm job chain (chain.json): format, lock, outcomes of its jobs, and the decision to submit another."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, TypeVar

from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.ops import slurm
from megatron_lite.runs.atomic import replace_file
from megatron_lite.runs.catalog import latest_iteration, locate
from megatron_lite.runs.exit_status import ROLLED_BACK, ExitStatus, read_exit_status
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.lock_file import read_owner
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.runs.process import this_process
from megatron_lite.system_errors import reason, remedy

CHAIN_NAME = "chain.json"
LOCK_NAME = "chain.lock"
LOCK_SECONDS = 180.0
"""Time to wait for another command on the same chain, which may wait for slurmctld, or for its stale lock."""
RESERVE_NAME = "chain.reserve"
RESERVE_BYTES = 65536
"""Size of a file that is removed when the disk is full, to make room for chain.json."""
COMPLETE = ("completed", "evaluated")
"""Values of exit_status.json after which the chain is complete."""
ENDING = ("kill_switch", "exit_flag")
"""Values of exit_status.json with which the user ends the run."""
STOPPED_BY_USER = "cancelled with `slurm stop`"
"""Reason of a chain that `slurm stop` has ended."""
MAX_FAILURES = 3
"""Failures in a row at the same saved iteration after which the chain stops."""
MAX_IDLE = 10
"""Jobs in a row, failed or not, without a new checkpoint, after which the chain stops."""
BACKOFF_MINUTES = 2
"""Delay of the successor after a failure, doubled with each further one."""
HOST_FAILURES = 2
"""Failures that began on one host after which its node is excluded."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Start:
    """One start of a job; a job that Slurm requeues starts again under its number.

    Attributes:
        job: number of the job.
        restart: number of times that it was requeued before.
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
        status: of exit_status.json; without one, "requeued", "cancelled" (scancel or preemption) or "killed".
        message: the error, or how the job ended.
        iteration: the checkpoint from which the next job resumes; 0: there is none.
        host: on which an error occurred first; empty: unknown.
        time: when the end was recorded, UTC, ISO 8601.
        disk_full: its last save failed, and there is no room for another one.
    """

    start: str
    status: str
    message: str
    iteration: int
    host: str
    time: str
    disk_full: bool = False

    @property
    def failed(self) -> bool:
        """Whether the job ended because of an error, or in an unknown way."""
        return self.status in ("error", "killed")


@dataclass(frozen=True)
class Chain:
    """Content of chain.json.

    Attributes:
        script: the user's job script, absolute.
        arguments: of the script.
        options: of sbatch.
        state: active; or completed or stopped, for `reason`.
        reason: why the chain ended.
        job: the job that runs or ran last, with its restart; its number is empty before the first one.
        successor: the job that waits for its end, or the first job; empty: none is submitted.
        outcomes: of earlier jobs, oldest first.
        excluded: nodes on which no further job runs.
        warning: a call of Slurm that failed.
        earlier_exit: time in the exit_status.json that was there when the job began; empty: there was none.
    """

    script: str
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    state: Literal["active", "completed", "stopped"] = "active"
    reason: str = ""
    job: Start = Start("")
    successor: str = ""
    outcomes: tuple[Outcome, ...] = ()
    excluded: tuple[str, ...] = ()
    warning: str = ""
    earlier_exit: str = ""

    @property
    def jobs(self) -> tuple[str, ...]:
        """Numbers of the jobs that may be in the queue."""
        return tuple(job for job in (self.job.job, self.successor) if job)

    @property
    def failures(self) -> int:
        """Number of failures in a row, up to the last job, at the same saved iteration."""
        return self._count(lambda outcome: outcome.failed)

    @property
    def idle(self) -> int:
        """Number of jobs in a row, up to the last one, that ended at the same saved iteration."""
        return self._count(lambda outcome: True)

    def _count(self, counts: Callable[[Outcome], bool]) -> int:
        number = 0
        for outcome in reversed(self.outcomes):
            if not counts(outcome) or outcome.iteration != self.outcomes[-1].iteration:
                break
            number += 1
        return number


def read_chain(folder: Path) -> Chain | None:
    """Return the chain of a run; None: it has none, or chain.json was copied from another folder.

    Raises:
        ConfigError: chain.json is damaged.
    """
    chain, recorded = _read(folder)
    return None if _is_other(folder, recorded) else chain


def existing_chain(folder: Path) -> Chain:
    """Return the chain of a run.

    Raises:
        ConfigError: it has none, chain.json was copied from another folder, or is damaged.
    """
    chain, recorded = _read(folder)
    submit = "submit the run with `megatron-lite slurm submit --chain JOB.slurm`"
    if _is_other(folder, recorded):
        raise ConfigError(
            f"{folder / CHAIN_NAME} is a copy: it describes the jobs of the run {recorded}",
            fix=f"Give {recorded}. If {folder} is a run of its own, or {recorded} was moved there, set --save and "
            f"--load to {folder} in the job script, and {submit}",
        )
    if chain is not None:
        return chain
    if not folder.is_dir():
        raise ConfigError(f"The folder {folder} does not exist", fix="Give the --save folder of a run")
    below = sorted(path.parent.name for path in folder.glob(f"*/{CHAIN_NAME}"))
    problem, fix = f"{folder} has no chain ({CHAIN_NAME})", "Give the run's --save folder"
    owner = read_owner(folder)
    job = owner.process.slurm_job if owner is not None else ""
    if below:
        fix = f"Give one of its folders with a chain ({', '.join(below)})"
    elif job or latest_iteration(folder) or read_exit_status(folder):
        problem += f"; Slurm job {job} trains in it" if job else ": its jobs were submitted without --chain"
        fix = f"See its state with `megatron-lite watch {folder}`, end a job with `scancel {job or 'JOB'}`"
    raise ConfigError(problem, fix=f"{fix}, or {submit}")


def _read(folder: Path) -> tuple[Chain | None, str]:
    """Return the content of chain.json, and the folder for which it was written; empty: unknown."""
    path = folder / CHAIN_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = str(content.pop("folder", ""))
        outcomes = tuple(Outcome(**outcome) for outcome in content.pop("outcomes"))
        for name in ("arguments", "options", "excluded"):
            content[name] = tuple(content[name])
        return Chain(**content | {"job": Start(**content["job"])}, outcomes=outcomes), recorded
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"Cannot read the chain {path}: {_damage(error)}",
            fix="Restore the file if it was edited. Otherwise cancel the chain's jobs (squeue --me, scancel JOB), "
            f"remove {path} and submit the chain again: the run continues from its last checkpoint",
        ) from error


def _damage(error: BaseException) -> str:
    """Return why chain.json cannot be read."""
    if isinstance(error, KeyError):
        return f"the entry {error} is missing"
    if isinstance(error, ValueError):
        return f"it is not valid JSON ({error})"
    return reason(error) if isinstance(error, OSError) else f"its entries are not those of a chain ({error})"


def _is_other(folder: Path, recorded: str) -> bool:
    """Return whether a recorded folder is another one; its path may differ where a link leads to it."""
    if recorded in ("", str(folder.absolute())):
        return False
    try:
        return not folder.samefile(recorded)
    except OSError:
        return True


def write_chain(folder: Path, chain: Chain) -> Chain:
    """Write chain.json; return the chain.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    content = (json.dumps({"folder": str(folder.absolute()), **asdict(chain)}, indent=2) + "\n").encode()
    _with_reserve(folder, lambda: replace_file(folder / CHAIN_NAME, content))
    return chain


@contextmanager
def locked(folder: Path, start: Start | None = None) -> Iterator[None]:
    """Hold the lock of a chain, which serializes the commands that change it.

    Args:
        folder: the --save folder; created where missing.
        start: the job in which this process runs, by which the lock of its earlier starts is recognized as stale.

    Raises:
        ConfigError: another command holds the lock for too long, or the folder cannot be written to.
    """
    start = start or Start("")
    lock = FolderLock(
        folder,
        name=LOCK_NAME,
        process=this_process(socket.gethostname(), start.job, start.restart),
        command="slurm",
        notify=lambda text: print(text, file=sys.stderr, flush=True),
    )
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            _with_reserve(folder, lock.acquire)
            break
        except CheckpointError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Another command has been changing the chain for {LOCK_SECONDS:.0f} s: {error.problem}",
                    fix=error.fix,
                ) from error
            time.sleep(1.0)
    try:
        reserve = folder / RESERVE_NAME
        if not reserve.exists():
            with suppress(OSError):
                reserve.write_bytes(bytes(RESERVE_BYTES))
        yield
    finally:
        lock.release()


def outcome_of(folder: Path, start: Start, *, earlier_exit: str = "", how: str = "", requeued: bool = False) -> Outcome:
    """Return how a start of a job ended, from exit_status.json, else from Slurm.

    Args:
        folder: the --save folder.
        start: the job and its restart.
        earlier_exit: as in Chain.
        how: how it ended, where there is no exit_status.json; empty: Slurm is asked.
        requeued: Slurm has started the same job again.
    """
    status = read_exit_status(folder)
    saved = latest_iteration(folder) or 0
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    # The file of an earlier start stays if this one was killed before it began to train.
    if status is not None and status.status != ROLLED_BACK and _is_of_start(status, start, earlier_exit):
        host = status.host if status.status == "error" else ""
        full = status.status == "error" and max(status.failed_saves, default=0) > saved and not _has_room(folder, saved)
        return Outcome(str(start), status.status, status.message, saved, host, now, full)
    if requeued:
        return Outcome(str(start), "requeued", "requeued by Slurm before it wrote an exit status", saved, "", now)
    if how:
        return Outcome(str(start), "killed", how, saved, "", now)
    state = slurm.final_state(start.job) if start.job else None
    kind = "cancelled" if state in ("CANCELLED", "PREEMPTED") else "killed"
    text = f"ended without an exit status{f' (Slurm: {state})' if state else ''}"
    return Outcome(str(start), kind, text, saved, "", now)


def add_outcome(chain: Chain, outcome: Outcome) -> Chain:
    """Return the chain with a further outcome, ended where no further job is wanted."""
    chain = replace(chain, outcomes=(*chain.outcomes, outcome))
    if chain.state != "active":
        return chain
    if outcome.status in COMPLETE:
        return replace(chain, state="completed", reason=outcome.message)
    if outcome.status in ENDING:
        return replace(chain, state="stopped", reason=outcome.message)
    if outcome.disk_full:
        # The next job would train up to the same save, and lose it in the same way.
        return replace(chain, state="stopped", reason=f"the disk is full: {outcome.message}")
    on_host = sum(earlier.failed and earlier.host == outcome.host for earlier in chain.outcomes)
    if outcome.host and on_host >= HOST_FAILURES and outcome.host not in chain.excluded:
        chain = replace(chain, excluded=(*chain.excluded, outcome.host))
    at = f"at iteration {outcome.iteration:,}; the last: {outcome.message}"
    if chain.failures >= MAX_FAILURES:
        return replace(chain, state="stopped", reason=f"{chain.failures} failures in a row {at}")
    if chain.idle >= MAX_IDLE:
        return replace(chain, state="stopped", reason=f"{chain.idle} jobs in a row without a new checkpoint, {at}")
    return chain


def backoff_minutes(chain: Chain) -> int:
    """Return the delay of the next job after the failures of a chain."""
    return BACKOFF_MINUTES * 2 ** max(0, chain.failures - 1)


def _is_of_start(status: ExitStatus, start: Start, earlier_exit: str) -> bool:
    """Return whether a start of a job wrote an exit status; under torchrun, the file does not name the job."""
    match = re.match(r"Slurm step (\w+)\.\d+, restart (\d+)", status.job)
    return (match[1], int(match[2])) == (start.job, start.restart) if match else status.time != earlier_exit


def _has_room(folder: Path, saved: int) -> bool:
    """Return whether a checkpoint as large as the last one fits on the disk; False if there is none."""
    try:
        manifest = read_manifest(locate(folder, saved))
        return shutil.disk_usage(folder).free >= sum(file.size for file in manifest.files.values())
    except (CheckpointError, OSError):
        return False


def _with_reserve(folder: Path, action: Callable[[], _Result]) -> _Result:
    """Return the result of an action that writes, after making room on a full disk.

    Raises:
        ConfigError: it cannot write all the same.
    """
    try:
        try:
            return action()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (folder / RESERVE_NAME).exists():
                raise
            (folder / RESERVE_NAME).unlink(missing_ok=True)
            return action()
    except OSError as error:
        raise ConfigError(
            f"Cannot write the state of the chain to {folder}: {reason(error)}",
            fix=f"{remedy(error, folder, writing=True)}, then give the same command again",
        ) from error
