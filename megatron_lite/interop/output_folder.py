"""Atomic output folder: written under a temporary name and renamed at the end, complete or absent."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_size
from megatron_lite.runs.atomic import sync_folder
from megatron_lite.system_errors import reason, remedy

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only writing raises."""


def check_output(output: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        CheckpointError: it is a file, or a folder that holds something.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise CheckpointError(
            f"--output {output} exists already and is not empty"
            if output.is_dir()
            else f"--output {output} exists already and is no folder",
            fix="Give --output a new or empty folder",
        )


@contextmanager
def new_folder(output: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that gets its name if the block ends without an error.

    Args:
        output: the folder to make; it must not exist, or be empty.
        needed: bytes that will be written.

    Raises:
        CheckpointError: `output` exists, there is no room, or it cannot be written. Nothing is left then.
    """
    check_output(output)
    output = output.absolute()
    partial = output.with_name(f"{output.name}.partial-{os.uname().nodename}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(output)
        _check_room(output, needed)
        partial.mkdir()
        yield partial
        sync_folder(partial)
        partial.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise _unwritable(output, error, needed) from error
    except CheckpointError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:  # of a save, whose advice is for a run
            raise _unwritable(output, cause, needed) from cause
        raise
    except KeyboardInterrupt:
        print(f"{output} was not written; nothing is left of it", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(output: Path) -> None:
    """Remove what killed processes of this machine left of the same output."""
    pattern = re.compile(re.escape(f"{output.name}.partial-{os.uname().nodename}-") + r"(\d+)")
    for entry in output.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)
            print(f"removed {entry}, which a killed process had left", file=sys.stderr)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise CheckpointError(
            f"The disk has no room for --output {output}: it needs {format_size(needed)}, and {format_size(free)} are "
            "free in "
            f'"{output.parent}"',
            fix="Free space there, or give an --output on another disk",
        )


def _unwritable(output: Path, error: OSError, needed: int) -> CheckpointError:
    where = f" ({error.filename})" if error.filename else ""
    try:
        free = (
            f"; {format_size(shutil.disk_usage(output.parent).free)} are free there, {format_size(needed)} are needed"
        )
    except OSError:
        free = ""
    return CheckpointError(
        f"Cannot write --output {output}: {reason(error)}{where}{free}",
        fix=f"{remedy(error, output, instead='give another --output', writing=True)}. The unfinished output was "
        "deleted",
    )
