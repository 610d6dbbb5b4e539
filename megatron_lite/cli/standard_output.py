"""Standard output of commands: printed tables, and errors of a closed pipe or a full disk."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

if TYPE_CHECKING:
    from rich.console import Console


def make_console(**options: Any) -> Console:
    """Return a rich console on standard output, which raises BrokenPipeError instead of exiting with code 1."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise

    return PipedConsole(**options)


def flush_output(text: str = "") -> None:
    """Write what is still buffered, and `text`.

    Raises:
        BrokenPipeError: the reader has closed the pipe.
        DataError: it cannot be written otherwise, as on a full disk.
    """
    if sys.stdout is None:  # closed by the shell: >&-
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise DataError(
            f"Cannot write to standard output: {reason(error)}",
            fix=remedy(error, "/dev/stdout", instead="redirect the output to another file", writing=True),
        ) from error


def discard_output() -> None:
    """Redirect standard output to the null device, because Python repeats a failed write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
