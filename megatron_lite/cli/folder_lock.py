"""Save-folder guard for commands: takes the lock of --save, or refuses while a job is running there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lite.backend.environment import read_launch
from megatron_lite.errors import CheckpointError
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.rollback import WEIGHTS_FOLDER
from megatron_lite.system_errors import reason, remedy


@contextmanager
def holding(folder: Path, command: str) -> Iterator[None]:
    """Hold the lock of a --save folder; a folder created for it is removed if it stays empty.

    Raises:
        CheckpointError: a job uses the folder, or it is not writable.
    """
    # The folder of --weights-only-every is inside the folder of its run.
    root = folder.parent if folder.name == WEIGHTS_FOLDER and folder.is_dir() else folder
    made = not root.exists()
    lock = FolderLock(
        root, process=read_launch().process, command=command, notify=lambda text: print(text, file=sys.stderr)
    )
    try:
        lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {error.filename or root}: {reason(error)}",
            fix=remedy(error, root, instead="give another folder", writing=True),
        ) from error
    try:
        yield
    finally:
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
