"""Token progress of dataset scans: a bar on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

QUIET_SECONDS = 10.0


class TokenProgress:
    """Shows progress on standard error while the context lasts.

    Args:
        what: the action, in a word.
        total: tokens in all.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._bar: Any = None
        self._told = time.monotonic()

    def advance(self, tokens: int) -> None:
        """So many more are done."""
        self.done += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=tokens)
        elif time.monotonic() - self._told >= QUIET_SECONDS:
            self._told = time.monotonic()
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
