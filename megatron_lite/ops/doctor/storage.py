"""Storage probe: write speed, latency of small files, free space, inodes and quota of the --save folder."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path

from megatron_lite.ops.doctor.report import Storage

BLOCK = 8 * 2**20
"""Bytes of one write."""
SMALL_FILES = 20
QUOTA_SECONDS = 10.0
"""Time limit of quota and lfs."""


def existing_folder(folder: Path) -> Path:
    """Return a folder, or the lowest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def probe_storage(folder: Path, *, size: int, seconds: float) -> Storage:
    """Measure a folder; every file that is written is removed, also when the process is killed.

    Args:
        folder: the --save folder, which may not exist yet.
        size: bytes to write at most.
        seconds: after which writing ends, once a block is written.

    Raises:
        OSError: a file cannot be written; the text names the cause.
    """
    path = existing_folder(folder)
    speed = _write_speed(path, size, seconds)
    state = os.statvfs(path)
    quota = read_quota(path)
    return Storage(
        path=str(path),
        write_speed=speed,
        rename_seconds=_rename_seconds(path),
        free=state.f_bavail * state.f_frsize,
        free_inodes=state.f_favail if state.f_files else None,
        quota_left=quota[0],
        quota_files_left=quota[1],
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


def read_quota(path: Path) -> tuple[int | None, int | None]:
    """Return bytes and files that the user's quota leaves at a path; None: unknown or without a limit."""
    user = str(os.getuid())
    for command in (["lfs", "quota", "-q", "-u", user, str(path)], ["quota", "-w", "-p", "-u"]):
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=QUOTA_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        found = parse_quota(done.stdout, _mount(path))
        if found != (None, None):
            return found
    return None, None


def parse_quota(text: str, mount: str) -> tuple[int | None, int | None]:
    """Read the output of `lfs quota -q` or `quota -w -p`.

    Args:
        text: lines of file system, used KiB, soft limit, hard limit, grace time, used files, soft limit, hard limit.
        mount: mount point or device of the folder; a line of another file system is ignored.
    """
    # `lfs` breaks the line after a long path.
    for line in re.sub(r"^(\s*/\S*)\s*\n", r"\1 ", text, flags=re.MULTILINE).splitlines():
        words = line.split()
        if len(words) < 8 or not words[1].rstrip("*").isdigit():
            continue
        if words[0] not in mount.split() and not any(place.startswith(f"{words[0]}/") for place in mount.split()):
            continue
        left = []
        for used, soft, hard in (words[1:4], words[5:8]):
            limit = int(hard) or int(soft) if hard.isdigit() and soft.isdigit() else 0
            left.append(limit - int(used.rstrip("*")) if limit else None)
        return None if left[0] is None else left[0] * 1024, left[1]
    return None, None


def _mount(path: Path) -> str:
    """Return device and mount point of a path, and the path."""
    point = path
    while not point.is_mount() and point != point.parent:
        point = point.parent
    device = ""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
        device = next((line.split()[0] for line in reversed(lines) if line.split()[1] == str(point)), "")
    except OSError:
        pass
    return f"{device} {point} {path}"
