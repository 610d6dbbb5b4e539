"""End time of the current Slurm job: from SLURM_JOB_END_TIME or squeue, queried again during training.

Imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from megatron_lite.formatting import format_duration

ASK_INTERVAL = 300.0
"""Seconds between two calls of squeue: `scontrol update TimeLimit` changes the end of a running job."""
ASK_TIMEOUT = 10.0
"""Seconds after which a call of squeue is given up; the end known before is kept."""
MAX_DAYS = 300
"""Slurm reports the end of a job without time limit as a year ahead; an end beyond this is none."""


class JobEnd:
    """End of a Slurm job. A context manager: inside it a thread asks Slurm from time to time whether the end changed.

    Args:
        job: number of the job.
        end: Unix time; None: unknown or no limit.
        ask: returns the end by Slurm's controller; None: it did not answer.
        notify: receives a line when the end changes.
    """

    def __init__(
        self, job: str, end: float | None, *, ask: Callable[[], float | None], notify: Callable[[str], None]
    ) -> None:
        self.job = job
        self.end = end
        self._ask = ask
        self._notify = notify
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> JobEnd:
        threading.Thread(target=self._run, name="end of the Slurm job", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def seconds_left(self, *, needed: float = 0.0) -> float | None:
        """Return the seconds until the end; None: unknown or no limit.

        Args:
            needed: with fewer seconds left, Slurm is asked first: the limit may just have been raised.
        """
        if self.end is not None and self.end - time.time() < needed:
            self.refresh()
        return None if self.end is None else self.end - time.time()

    def refresh(self) -> None:
        """Ask Slurm for the end, and keep the known one if it does not answer."""
        end = self._ask()
        with self._lock:
            before = self.end
            if end is None or before == end:
                return
            self.end = end
        then = f" (before: {_clock(before)})" if before is not None else ""
        self._notify(f"Slurm job {self.job} now ends at {_clock(end)}{then}")

    def __str__(self) -> str:
        if self.end is None:
            return f"Slurm job {self.job}"
        return f"Slurm job {self.job}, which ends at {_clock(self.end)}, in {format_duration(self.end - time.time())}"

    def _run(self) -> None:
        while not self._closed.wait(ASK_INTERVAL):
            self.refresh()


def find_job_end(notify: Callable[[str], None], environment: Mapping[str, str] | None = None) -> JobEnd | None:
    """Return the end of the Slurm job in which this process runs; None: it runs in none.

    Slurm sets SLURM_JOB_END_TIME from version 23 on; before that, squeue is asked.

    Args:
        notify: receives a line when the end changes.
        environment: variables to read; None: the process's own.
    """
    variables = dict(os.environ if environment is None else environment)
    job = variables.get("SLURM_JOB_ID")
    if not job:
        return None
    if array := variables.get("SLURM_ARRAY_JOB_ID"):
        # The number of one of an array's jobs is that of the array, too, and squeue lists all its jobs for it.
        job = f"{array}_{variables.get('SLURM_ARRAY_TASK_ID', '')}"
    given = variables.get("SLURM_JOB_END_TIME", "")
    end = _limited(float(given)) if given.isdecimal() else _ask_squeue(job, variables)
    return JobEnd(job, end, ask=lambda: _ask_squeue(job, variables), notify=notify)


def _ask_squeue(job: str, variables: Mapping[str, str]) -> float | None:
    """Return the end of a job by squeue; None: no limit, no squeue here (in a container), or no answer in time."""
    # Users set SQUEUE_* to filter and format their own calls. `%s` is strftime's Unix time, in any time zone.
    environment = {name: value for name, value in variables.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%e"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=ASK_TIMEOUT,
            env={**environment, "SLURM_TIME_FORMAT": "%s"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # A heterogeneous job has one line for each component.
    ends = [float(word) for word in done.stdout.split() if word.isdecimal()]
    return _limited(min(ends)) if ends else None


def _limited(end: float) -> float | None:
    return end if end - time.time() < MAX_DAYS * 86400 else None


def _clock(end: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end))
