"""Preprocessing progress display: a bar on a terminal, Megatron's log lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

from megatron_lite.data.preparation.worker import Step
from megatron_lite.formatting import format_duration


class ProgressDisplay:
    """Base of progress displays, which shows nothing."""

    def start(self, total_bytes: int, left_bytes: int, units_done: int) -> None:
        """Begin the work.

        Args:
            total_bytes: bytes of the input.
            left_bytes: bytes of the unfinished units.
            units_done: units that an earlier run has finished.
        """

    def advance(self, step: Step) -> None:
        """Add the work of one step."""

    def stage(self, what: str, pieces: int) -> None:
        """Begin a stage after all text is read, of `pieces` pieces."""

    def piece(self) -> None:
        """Add one finished piece of the stage."""

    def say(self, text: str) -> None:
        """Print a line."""

    def close(self) -> None:
        """End the display."""


class LineProgress(ProgressDisplay):
    """Megatron's lines `Processed {n} documents ({docs/s} docs/s, {MB/s} MB/s).`, with the remaining time.

    Args:
        stream: output stream.
        interval: documents between two lines; None: a line every few seconds.
        clock: current time in seconds.
    """

    QUIET_SECONDS = 5.0

    def __init__(
        self, stream: TextIO, interval: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._documents = self._text_bytes = self._input_bytes = self._left = 0
        self._started = self._printed = clock()
        self._printed_documents = 0
        self._stage, self._pieces, self._pieces_done = "", 0, 0

    def start(self, total_bytes: int, left_bytes: int, units_done: int) -> None:
        """Begin the work, and print what an earlier run has finished."""
        self._left = left_bytes
        self._started = self._printed = self._clock()
        if units_done:
            self.say(
                f"Continuing: {units_done} units are done, {left_bytes / 1e6:,.1f} of {total_bytes / 1e6:,.1f} MB left"
            )

    def advance(self, step: Step) -> None:
        """Add the work of one step, and print a line if one is due."""
        self._documents += step.documents
        self._text_bytes += step.text_bytes
        self._input_bytes += step.input_bytes
        now = self._clock()
        if self._interval is None:
            due = now - self._printed >= self.QUIET_SECONDS
        else:
            due = self._documents // self._interval > self._printed_documents // self._interval
        if due and step.documents:
            self._printed, self._printed_documents = now, self._documents
            seconds = max(now - self._started, 1e-9)
            rate = self._input_bytes / seconds
            eta = format_duration((self._left - self._input_bytes) / rate) if rate else "unknown"
            self.say(
                f"Processed {self._documents} documents ({self._documents / seconds:.1f} docs/s, "
                f"{self._text_bytes / seconds / 1e6:.2f} MB/s). ETA {eta}"
            )

    def stage(self, what: str, pieces: int) -> None:
        """Begin a stage."""
        self._stage, self._pieces, self._pieces_done = what, pieces, 0
        self._started = self._printed = self._clock()

    def piece(self) -> None:
        """Add one finished piece, and print a line every few seconds."""
        self._pieces_done += 1
        now = self._clock()
        if now - self._printed >= self.QUIET_SECONDS:
            self._printed = now
            left = (now - self._started) / self._pieces_done * (self._pieces - self._pieces_done)
            self.say(f"{self._stage}: {self._pieces_done} of {self._pieces} pieces. ETA {format_duration(left)}")

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)


class BarProgress(ProgressDisplay):
    """Progress bar with MB/s, documents/s and the remaining time."""

    def __init__(self, stream: TextIO) -> None:
        import rich.console
        import rich.progress as parts

        self._console = rich.console.Console(file=stream)
        self._bar: Any = parts.Progress(
            parts.TextColumn("{task.description}"),
            parts.BarColumn(),
            parts.TaskProgressColumn(),
            parts.TextColumn("{task.fields[rate]}"),
            parts.TimeElapsedColumn(),
            parts.TextColumn("left"),
            parts.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None
        self._documents = self._text_bytes = 0
        self._started = time.monotonic()

    def start(self, total_bytes: int, left_bytes: int, units_done: int) -> None:
        """Show the bar."""
        if units_done:
            self.say(f"Continuing: {units_done} units are done")
        self._task = self._bar.add_task("preprocess", total=left_bytes, rate="")
        self._started = time.monotonic()
        self._bar.start()

    def advance(self, step: Step) -> None:
        """Add the work of one step."""
        self._documents += step.documents
        self._text_bytes += step.text_bytes
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._text_bytes / seconds / 1e6:.1f} MB/s  {self._documents / seconds:,.0f} docs/s"
        self._bar.update(self._task, advance=step.input_bytes, rate=rate)

    def stage(self, what: str, pieces: int) -> None:
        """Begin a stage with a new bar."""
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=pieces, rate="")

    def piece(self) -> None:
        """Add one finished piece."""
        self._bar.update(self._task, advance=1)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()
