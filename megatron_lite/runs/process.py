"""Process identity: machine, process id, start time and Slurm job, to tell whether a lock's owner still runs."""

from __future__ import annotations

import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process, distinguishable from any other on any host.

    Attributes:
        host: the host's name, for messages.
        machine: kernel boot and process namespace, within which the pid is unique.
        pid: process id.
        start: start time in the kernel's units; empty: unknown.
        slurm_job: SLURM_JOB_ID; empty: not in a Slurm job.
        slurm_restarts: number of times that Slurm has requeued the job.
    """

    host: str
    machine: str
    pid: int
    start: str = ""
    slurm_job: str = ""
    slurm_restarts: int = 0

    def __str__(self) -> str:
        restarts = f" (restart {self.slurm_restarts})" if self.slurm_restarts else ""
        job = f", Slurm job {self.slurm_job}{restarts}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process(host: str, slurm_job: str = "", slurm_restarts: int = 0) -> ProcessId:
    """Return this process's identity."""
    return ProcessId(
        host=host,
        machine=machine_id(),
        pid=os.getpid(),
        start=start_of(os.getpid()),
        slurm_job=slurm_job,
        slurm_restarts=slurm_restarts,
    )


def machine_id() -> str:
    """Return an identifier of this kernel's boot and process namespace; it differs after a reboot or in a container."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return f"{uuid.getnode():012x} {platform.node()}"


def is_running(process: ProcessId) -> bool | None:
    """Return whether a process still runs; None: unknown, because it is on another machine.

    A stopped process (SIGSTOP) runs; a zombie does not.
    """
    if process.machine != machine_id():
        return None
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, which /proc may hide
        return not _stat_of(process.pid) or start_of(process.pid) == process.start
    return start_of(process.pid) == process.start


def is_stopped(process: ProcessId) -> bool:
    """Return whether a process of this machine is held by SIGSTOP, Ctrl-Z or a debugger."""
    return _stat_of(process.pid)[:1] in (["T"], ["t"])


def start_of(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot; empty: unknown, or it has ended."""
    stat = _stat_of(pid)
    return stat[19] if stat and stat[0] not in "ZX" else ""


def _stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the state on, proc(5); none where it cannot be read."""
    try:
        # The second field, the program's name, may contain spaces and parentheses.
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
