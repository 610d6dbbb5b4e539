"""Atomic, durable file writes: temporary file, fsync, rename."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (created, renamed, removed) durable; file systems that cannot are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems refuse fsync on a folder; their renames are durable when the server says so.
        pass
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until its bytes are on the disk.

    Raises:
        OSError: no room, no permission.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Gives `path` new content in one step: a reader sees the old bytes or the new ones, never a mixture.

    Raises:
        OSError: no room, no permission; `path` is as it was.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(aside, data)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
