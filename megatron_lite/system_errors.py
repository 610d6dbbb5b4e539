"""Texts of operating system errors: reason and remedy of a failed file access, by errno."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_DEVICE = frozenset({errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EREMOTEIO})


def reason(error: BaseException) -> str:
    """Return why the operating system refused: "No space left on device"."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def remedy(error: BaseException, path: str | Path, *, instead: str = "", writing: bool = False) -> str:
    """Return what to do about a failed file access, for the fix of an error.

    Args:
        error: usually an OSError; one without errno has only the remedy `instead`.
        path: the file or folder, where the error does not name it.
        instead: another way out, in the imperative and without capital letter: "give another --save".
        writing: whether the file was to be written, created or deleted.
    """
    filename = getattr(error, "filename", None)
    target = Path(filename if isinstance(filename, (str, Path)) and str(filename) else path)
    first = _by_errno(getattr(error, "errno", None), target, writing=writing)
    if first and instead:
        return f"{first}, or {instead}"
    return first or instead[:1].upper() + instead[1:] or f'Repeat the command once "{target}" is accessible'


def _by_errno(code: int | None, target: Path, *, writing: bool) -> str:
    existing = next((part for part in (target, *target.parents) if _exists(part)), Path())
    match code:
        case errno.ENOSPC:
            folder = existing.absolute() if existing.is_dir() else existing.absolute().parent
            return f"Free space or files on the disk of {folder} (see df -h {folder}; df -i {folder}; quota -s)"
        case errno.EDQUOT:
            return f'Delete files to get below the disk quota of "{existing.absolute()}" (see quota -s)'
        case errno.EFBIG:
            return "Raise the limit of file sizes (ulimit -f)"
        case errno.EACCES | errno.EPERM:
            return f'Give this user permission to {"write to" if writing else "read"} "{existing.absolute()}" (ls -ld)'
        case errno.EROFS:
            return f'Make the disk of "{existing.absolute()}" writable, which is mounted read-only'
        case errno.ENOENT if writing and not target.parent.exists():
            return f'Create the folder "{target.parent}"'
        case errno.ENOTDIR if not writing:
            return f'Use a path that does not lead through the file "{existing}"'
        case errno.EEXIST | errno.ENOTDIR:
            blocking = existing if not existing.is_dir() else target
            return f'Use a path that does not lead through the file "{blocking}", or rename that file'
        case errno.EISDIR:
            return f'Give a file instead of the folder "{target}"'
        case errno.ENOTEMPTY:
            return f'Empty the folder "{target}"'
        case errno.EMFILE | errno.ENFILE:
            return "Raise the limit of open files (ulimit -n)"
        case errno.ENAMETOOLONG:
            return "Use a shorter path"
        case errno.ELOOP:
            return f'Remove the symbolic link at "{target}" that leads back to itself'
        case errno.EXDEV:
            return f'Use a path on the same file system as "{existing.absolute()}"'
        case _ if code in _DEVICE:
            return f'Check the disk or file server of "{existing.absolute()}" (dmesg), then repeat the command'
    return ""


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL byte in the name
        return False
