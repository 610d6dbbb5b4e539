"""Lock for commands that write to a --save folder, against a running job."""

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


@contextmanager
def holding(folder: Path, command: str) -> Iterator[None]:
    """Hold the lock of a --save folder while a command changes it; a folder that was made for it and stays empty goes.

    Raises:
        CheckpointError: a job uses the folder, or it cannot be written to.
    """
    # The folder of --weights-only-every lies in that of its run.
    root = folder.parent if folder.name == WEIGHTS_FOLDER and folder.is_dir() else folder
    made = not root.exists()
    lock = FolderLock(
        root, process=read_launch().process, command=command, notify=lambda text: print(text, file=sys.stderr)
    )
    try:
        lock.acquire()
    except OSError as error:
        raise CheckpointError(
            "The folder to write to must be a folder that can be written to",
            found=f"{error.filename or root}: {error.strerror}",
            fix="Make room, change its permissions, or give a folder that you may write to",
        ) from error
    try:
        yield
    finally:
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
