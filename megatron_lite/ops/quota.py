"""Free disk space and inodes of a folder: the file system's, and the user's or group's quota (Lustre, quota(1))."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
TIMEOUT = 20
"""Seconds after which a quota program is ignored."""


@dataclass(frozen=True)
class Space:
    """Space left for new files.

    Attributes:
        free: bytes.
        inodes: number of files; None: the file system has no limit.
        free_limit: source of the limit on bytes: "free", or "left of the user's quota".
        inode_limit: source of the limit on files.
    """

    free: int
    inodes: int | None
    free_limit: str = "free"
    inode_limit: str = "free"


def free_space(folder: Path) -> Space:
    """Return the space that the user may still fill below an existing folder."""
    usage = os.statvfs(folder)
    space = Space(usage.f_bavail * usage.f_frsize, usage.f_favail if usage.f_files else None)
    for source, left, files in _quotas(folder):
        if left is not None and left < space.free:
            space = Space(left, space.inodes, f"left of the {source}'s quota", space.inode_limit)
        if files is not None and (space.inodes is None or files < space.inodes):
            space = Space(space.free, files, space.free_limit, f"left of the {source}'s quota")
    return space


def _quotas(folder: Path) -> Iterator[tuple[str, int | None, int | None]]:
    """Yield the owner of each quota, and the bytes and files that it leaves; None: unlimited."""
    for flag, source in (("-u", "user"), ("-g", "group")):
        number = os.getuid() if flag == "-u" else os.getgid()
        tokens = _output("lfs", "quota", "-q", flag, str(number), str(folder)).split()
        yield source, *_left(tokens[1:])
    device = _device(folder)
    for flag, source in (("-u", "user"), ("-g", "group")):
        for line in _output("quota", "-wp", flag).splitlines():
            tokens = line.split()
            if tokens and tokens[0] == device:
                yield source, *_left(tokens[1:])


def _left(columns: Sequence[str]) -> tuple[int | None, int | None]:
    """Read the columns `blocks quota limit grace files quota limit grace`; blocks have 1 KiB; limit 0: none."""
    numbers = [column.rstrip("*") for column in columns]
    if len(numbers) < 7 or not all(numbers[place].isdigit() for place in (0, 1, 2, 4, 5, 6)):
        return None, None
    blocks, soft, hard, files, soft_files, hard_files = (int(numbers[place]) for place in (0, 1, 2, 4, 5, 6))
    # Above the soft limit, writing is refused once the grace period is over.
    limit, file_limit = soft or hard, soft_files or hard_files
    return (
        max(0, limit - blocks) * KIB if limit else None,
        max(0, file_limit - files) if file_limit else None,
    )


def _device(folder: Path) -> str:
    """Return the device or export that is mounted at a folder or above it."""
    best, device = "", ""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    path = str(folder.resolve())
    for line in lines:
        source, mount = line.split(" ")[:2]
        mount = mount.replace("\\040", " ")
        below = path == mount or path.startswith(mount.rstrip("/") + "/")
        if below and len(mount) >= len(best):
            best, device = mount, source
    return device


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    # quota(1) exits with 1 if a quota is exceeded.
    return done.stdout
