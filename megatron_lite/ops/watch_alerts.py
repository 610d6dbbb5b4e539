"""Alerts of `megatron-lite watch`: their rules, and a record of sent alerts that prevents repetitions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from megatron_lite.formatting import format_duration, format_size
from megatron_lite.ops.watch import RunStatus
from megatron_lite.ops.watch_job import ACTIVE
from megatron_lite.runs.atomic import replace_file

ALERTS_NAME = "alerts.json"
KINDS = {
    "not-running": "no job trains and none is queued, although the run is not complete",
    "stalled": "a job runs, but there is no new iteration for --stall-minutes",
    "nan": "the loss of the last iteration is not finite, or ended the job",
    "spike": "the loss is above --spike-factor times the median of the iterations before, or the run recorded a spike",
    "disk": "the free disk space does not suffice for the next saves",
    "slow-rank": "a rank computes longer than --slow-ratio times the median of the other ranks of its pipeline stage",
}
SPIKE_ITERATIONS = 3
"""Iterations in a row with a high loss that are a spike."""
MIN_LOSSES = 16
"""Iterations before them, without which there is no usual loss."""
SPIKE_SECONDS = 2 * 3600.0
"""Time for which a recorded spike is an alert: an hourly check sees it once at least."""
SAVE_MARGIN = 1.1
"""Free space for the next save, relative to the size of the last."""
MESSAGE_LENGTH = 300
"""Characters of an error that an alert repeats."""
_NAN = re.compile(r"has loss (nan|inf|-inf)")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits of the alerts.

    Attributes:
        stall_minutes: without a new iteration.
        spike_factor: of the loss to its usual value.
        slow_ratio: of a rank's compute time to the median.
    """

    stall_minutes: float = 30.0
    spike_factor: float = 2.0
    slow_ratio: float = 1.3


@dataclass(frozen=True)
class Alert:
    """A condition that needs a person.

    Attributes:
        kind: see KINDS.
        message: one line with the run's folder and values.
        subject: what of the run, if a kind can hold of several things: a spike, a host, the start of a job.
    """

    kind: str
    message: str
    subject: str = ""

    @property
    def key(self) -> str:
        """Return the identity of the alert while it holds."""
        return f"{self.kind} {self.subject}".strip()


def find_alerts(status: RunStatus, losses: Sequence[float], limits: Thresholds, now: float) -> list[Alert]:
    """Return the alerts that hold for a run.

    Args:
        status: the run's.
        losses: of the last iterations, oldest first.
        limits: thresholds.
        now: seconds since 1970.
    """
    found = [
        _not_running(status),
        _stalled(status, limits),
        _nan(status),
        _spike(status, losses, limits, now),
        _disk(status),
        *_slow_ranks(status, limits),
    ]
    return [Alert(kind, f"{status.run}: {text}", subject) for kind, text, subject in found if text]


_Finding = tuple[str, str, str]


def _not_running(status: RunStatus) -> _Finding:
    job = status.job
    # If Slurm does not answer, a job may be queued.
    holds = job.state not in ACTIVE and job.wanted and not job.queue_problem
    # Killed at first, and stopped when another rank has reported the failure: the end of the same start.
    started = f"{status.started:.0f}" if status.started else ""
    text = f"not running and not queued: {job.state}: {_first_sentence(job.reason)}"
    return "not-running", text if holds else "", started


def _stalled(status: RunStatus, limits: Thresholds) -> _Finding:
    holds = status.job.state in ("running", "starting", "paused") and (status.age or 0.0) > 60 * limits.stall_minutes
    done = "no iteration yet" if status.iteration is None else f"no iteration since {status.iteration:,}"
    text = f"{done} for {format_duration(status.age or 0.0)}; the job is {status.job.state}: {status.job.reason}"
    return "stalled", text if holds else "", ""


def _nan(status: RunStatus) -> _Finding:
    if status.loss is not None and not math.isfinite(status.loss):
        return "nan", f"the loss is {status.loss} at iteration {status.iteration:,}", ""
    ended = status.job.state not in ACTIVE and _NAN.search(status.job.reason)
    return "nan", f"the job ended: {_first_sentence(status.job.reason)}" if ended else "", status.job.ended


def _spike(status: RunStatus, losses: Sequence[float], limits: Thresholds, now: float) -> _Finding:
    if status.last_spike is not None and now - status.last_spike[0] < SPIKE_SECONDS:
        return "spike", status.last_spike[1].removeprefix("WARNING: "), f"{status.last_spike[0]:.0f}"
    finite = [loss for loss in losses if math.isfinite(loss)]
    before, last = finite[:-SPIKE_ITERATIONS], finite[-SPIKE_ITERATIONS:]
    if len(before) < MIN_LOSSES or status.job.state not in ACTIVE:
        return "spike", "", ""
    usual = median(before)
    holds = min(last) > limits.spike_factor * usual
    text = f"loss spike: the last {len(last)} losses are {min(last):.4g} or more, from a median of {usual:.4g}"
    return "spike", f"{text}, at iteration {status.iteration:,}" if holds else "", ""


def _disk(status: RunStatus) -> _Finding:
    size, free = status.checkpoint_size, status.free
    # A run that keeps all checkpoints needs the space again and again: it is reported one save earlier.
    if not size or free is None or not status.job.wanted or free >= size * (SAVE_MARGIN + status.keeps_all):
        return "disk", "", ""
    keeps = ", and the run keeps all checkpoints" if status.keeps_all else ""
    return "disk", f"{format_size(free)} free, a save takes {format_size(size)}{keeps}", ""


def _first_sentence(text: str) -> str:
    """Return what happened; the rest of an error says what to do."""
    sentence = text.partition(". ")[0]
    return sentence if len(sentence) <= MESSAGE_LENGTH else f"{sentence[:MESSAGE_LENGTH]}…"


def _slow_ranks(status: RunStatus, limits: Thresholds) -> list[_Finding]:
    if status.job.state not in ACTIVE:
        return []
    hosts: dict[str, list[Any]] = {}
    for rank in status.ranks:
        if rank.ratio > limits.slow_ratio:
            hosts.setdefault(rank.host, []).append(rank)
    found = []
    for host, ranks in hosts.items():
        worst = max(ranks, key=lambda rank: rank.ratio)
        names = ", ".join(str(rank.rank) for rank in ranks[:8]) + (
            f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        )
        text = (
            f"slow on {host or 'an unknown host'}: rank {names}; rank {worst.rank} computes for {worst.seconds:.3f} s, "
            f"{worst.ratio:.2f} times the median"
        )
        found.append(("slow-rank", text, host))
    return found


@dataclass
class AlertRecord:
    """The alerts of a run that were sent and still hold, in ALERTS_NAME of its folder.

    The file outlives the process, so that an hourly check sends an alert once.

    Attributes:
        folder: the run's.
        notify: receives a line if the file cannot be read or written.
    """

    folder: Path
    notify: Callable[[str], None]
    _sent: dict[str, dict[str, str]] = field(default_factory=dict)

    def update(self, alerts: Sequence[Alert], send: Callable[[Alert], bool]) -> None:
        """Send the alerts that are new, and forget those that have cleared.

        Args:
            alerts: those that hold now.
            send: sends one; False: it failed, and is repeated at the next update.
        """
        before = self._read()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        after = {}
        for alert in alerts:
            if alert.key in before:
                after[alert.key] = before[alert.key]
            elif send(alert):
                after[alert.key] = {"since": now, "message": alert.message}
        self._sent = after
        if after != before:
            self._write(after)

    def _read(self) -> dict[str, dict[str, str]]:
        path = self.folder / ALERTS_NAME
        try:
            content = json.loads(path.read_bytes())
            return {str(key): dict(entry) for key, entry in content.items()}
        except FileNotFoundError:
            return self._sent  # the folder may not exist, or be read-only
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self.notify(f"WARNING: cannot read {path} ({error}): alerts may be sent again")
            return self._sent

    def _write(self, content: dict[str, dict[str, str]]) -> None:
        if not self.folder.is_dir():
            return
        try:
            replace_file(self.folder / ALERTS_NAME, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            self.notify(
                f"WARNING: cannot write {self.folder / ALERTS_NAME} ({error.strerror}): the next start of watch sends "
                "the alerts again"
            )
