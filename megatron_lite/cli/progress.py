"""Progress bars of CLI commands: bytes, stages and tokens on stderr; plain lines if stderr is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

QUIET_SECONDS = 10.0


class TokenProgress:
    """Context manager that shows the progress of a scan over tokens.

    Args:
        what: name of the operation.
        total: total number of tokens.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._bar: Any = None
        self._printed_at = time.monotonic()

    def advance(self, tokens: int) -> None:
        """Add finished tokens."""
        self.done += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=tokens)
        elif time.monotonic() - self._printed_at >= QUIET_SECONDS:
            self._printed_at = time.monotonic()
            print(f"{self.what}: {self.done:,} of {self.total:,} tokens", file=sys.stderr, flush=True)

    def __enter__(self) -> TokenProgress:
        if sys.stderr.isatty():
            import rich.console
            import rich.progress as parts

            self._bar = parts.Progress(
                parts.TextColumn("{task.description}"),
                parts.BarColumn(),
                parts.TaskProgressColumn(),
                parts.TextColumn("left"),
                parts.TimeRemainingColumn(),
                console=rich.console.Console(file=sys.stderr),
                transient=True,
            )
            self._bar.add_task(self.what, total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (finished bytes, total bytes)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (description of the stage, finished units, total units)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
