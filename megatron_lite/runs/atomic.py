"""Atomic, durable file writes: temporary file, fsync, rename."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (created, renamed, removed) durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems refuse fsync on a folder; the server makes their renames durable.
        pass
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until its bytes are on the disk.

    Raises:
        OSError: no room, no permission.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of `path` atomically: a reader sees the old bytes or the new ones, never a mixture.

    Raises:
        OSError: no room, no permission; `path` is unchanged.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(aside, data)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
