"""Exit status of a job (exit_status.json, completed_iteration.txt): format and reading.

Scripts decide by these files whether to resubmit a job; lifecycle/exit_status.py writes them, and runs/rollback.py
replaces those of a later iteration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

EXIT_STATUS_NAME = "exit_status.json"
COMPLETED_NAME = "completed_iteration.txt"
ROLLED_BACK = "rolled_back"
"""Status that `megatron-lite rollback` writes, instead of that of the last job."""


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """Content of exit_status.json.

    Attributes:
        status: completed, evaluated, time_limit, signal, kill_switch, exit_flag, error or rolled_back.
        message: the log line with which the job ended, or the error.
        iteration: last finished iteration of the run; None: the job ended before it had loaded a checkpoint.
        saved_iteration: the checkpoint from which the next start resumes; None: there is none.
        time: UTC, ISO 8601.
        host: of the rank that failed first if status is error, else of the rank that wrote the file.
        rank: the rank that failed first; None unless status is error.
        failed_saves: iterations of this job whose saves failed, also under --on-failed-save continue.
        job: identifies the start of the job that ended; empty outside of Slurm and torchrun.
    """

    status: str
    message: str
    iteration: int | None = None
    saved_iteration: int | None = None
    time: str = ""
    host: str = ""
    rank: int | None = None
    failed_saves: Sequence[int] = ()
    job: str = ""

    def encode(self) -> bytes:
        """Return the bytes of exit_status.json."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes) -> ExitStatus | None:
        """Inverse of encode; None: the content is damaged or of another version."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None


def read_exit_status(folder: Path) -> ExitStatus | None:
    """Return how the last job in `folder` ended; None while one runs, or if it was killed without writing the file."""
    content = read_bytes(folder / EXIT_STATUS_NAME)
    return None if content is None else ExitStatus.decode(content)


def completed_iteration(folder: Path) -> int | None:
    """Return the iteration at which the run in `folder` was completed, last evaluations included; None: incomplete.

    It outlives exit_status.json, which a later start that fails replaces, until a job trains there again.
    """
    text = (read_bytes(folder / COMPLETED_NAME) or b"").decode(errors="replace").strip()
    return int(text) if text.isdecimal() else None


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file; None: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None
