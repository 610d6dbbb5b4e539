"""Storage probe: write speed, latency of small files, free space, inodes and quota of the --save folder."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from megatron_lite.ops.doctor.report import Storage
from megatron_lite.ops.quota import free_space
from megatron_lite.ops.storage import nearest_existing

BLOCK = 8 * 2**20
"""Bytes of one write."""
SMALL_FILES = 20
"""Small files whose latency is averaged."""


def probe_storage(folder: Path, *, size: int, seconds: float) -> Storage:
    """Measure a folder; every file that is written is removed, also when the process is killed.

    Args:
        folder: the --save folder, which may not exist yet.
        size: bytes to write at most.
        seconds: after which writing ends, once a block is written.

    Raises:
        OSError: a file cannot be written; the text names the cause.
    """
    path = nearest_existing(folder)
    speed = _write_speed(path, size, seconds)
    space = free_space(path)
    return Storage(
        path=str(path),
        write_speed=speed,
        rename_seconds=_rename_seconds(path),
        free=space.free,
        free_limit=space.free_limit,
        inodes=space.inodes,
        inode_limit=space.inode_limit,
    )


def _write_speed(folder: Path, size: int, seconds: float) -> float:
    name = folder / f".doctor-{secrets.token_hex(6)}"
    block = os.urandom(min(BLOCK, size))  # file systems that compress gain nothing from it
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        # Without a name the file ends with the process, even by kill -9.
        name.unlink()
        began, written = time.monotonic(), 0
        while written < size and (not written or time.monotonic() - began < seconds):
            written += os.write(descriptor, block)
        os.fsync(descriptor)
        return written / max(1e-9, time.monotonic() - began)
    finally:
        os.close(descriptor)


def _rename_seconds(folder: Path) -> float:
    began = time.monotonic()
    for _ in range(SMALL_FILES):
        name = folder / f".doctor-{secrets.token_hex(6)}"
        renamed = name.with_suffix(".renamed")
        try:
            name.touch(exist_ok=False)
            name.rename(renamed)
        finally:
            name.unlink(missing_ok=True)
            renamed.unlink(missing_ok=True)
    return (time.monotonic() - began) / SMALL_FILES
