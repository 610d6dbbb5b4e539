"""Progress-bar sink: one line at the bottom of the terminal with loss, speed and remaining time."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from megatron_lite.config.run import RunConfig
from megatron_lite.formatting import format_duration, format_short
from megatron_lite.metrics.report import IterationReport, RunFacts, ValidationReport
from megatron_lite.metrics.sink import Sink


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal with cursor movement."""
    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


def format_status(report: IterationReport, validation_loss: float | None, width: int = 1000) -> str:
    """Return the text beside the bar; less important values are dropped to fit `width` columns."""
    parts = {"count": f"{report.iteration}/{report.train_iterations}"}
    if "lm loss" in report.losses:
        parts["loss"] = f"loss {report.losses['lm loss']:.4f}"
    if validation_loss is not None:
        parts["valid"] = f"valid {validation_loss:.4f}"
    parts["lr"] = f"lr {report.learning_rate:.2e}"
    parts["speed"] = f"{format_short(report.tokens_per_second)} tokens/s"
    if report.mfu is not None:
        parts["mfu"] = f"MFU {report.mfu * 100.0:.1f}%"
    if report.eta_seconds is not None:
        parts["eta"] = f"ETA {format_duration(report.eta_seconds)}"
    for name in ("lr", "mfu", "speed", "valid", "eta"):
        if len(" · ".join(parts.values())) <= width:
            break
        parts.pop(name, None)
    return " · ".join(parts.values())


_BAR = 8
"""Minimum columns of the bar."""


class ProgressSink(Sink):
    """Progress bar; the console sink prints its lines above the bar through `write`.

    Args:
        stream: a terminal (is_terminal).
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        # Four updates a second: drawing competes with the thread that launches kernels.
        self._progress = Progress(
            TextColumn("{task.percentage:>3.0f}%"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._console,
            refresh_per_second=4,
            expand=True,
        )
        self._task: TaskID | None = None
        self._validation_loss: float | None = None
        self._last: IterationReport | None = None

    def write(self, line: str) -> None:
        """Print `line` unchanged above the bar, or at the cursor while there is no bar."""
        self._console.print(Text(line), soft_wrap=True, highlight=False)

    def start(self, config: RunConfig, facts: RunFacts) -> None:
        """Show the bar at the start iteration."""
        self._task = self._progress.add_task(
            "train", total=facts.train_iterations, completed=facts.start_iteration, status="starting"
        )
        self._progress.start()

    def iteration(self, report: IterationReport) -> None:
        """Update the bar."""
        self._last = report
        self._update()

    def validation(self, report: ValidationReport) -> None:
        """Show the validation loss beside the bar."""
        if report.split == "validation":
            self._validation_loss = report.losses.get("lm loss", self._validation_loss)
            self._update()

    def _update(self) -> None:
        if self._task is not None and self._last is not None:
            status = format_status(self._last, self._validation_loss, self._console.width - _BAR - len(" 100%  "))
            self._progress.update(self._task, completed=self._last.iteration, status=status)

    def stopping(self) -> None:
        """Stop the bar in its last state and restore the cursor."""
        self._progress.stop()

    def close(self) -> None:
        """Stop the bar after a failure, when stopping() was not called."""
        self._progress.stop()
