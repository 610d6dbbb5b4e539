"""Output files of commands: atomic writes, only over an earlier output of the same format; errors name the flag."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.errors import ConfigError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.system_errors import reason, remedy

COMPARED = 200
"""Bytes at the beginning of an existing file that are read."""


def write_output(path: Path, text: str, flag: str) -> None:
    """Write a text file, whose folder is created; an interrupted write leaves the old file.

    Args:
        path: the file; an existing one is replaced if it begins as `text` does.
        text: its content.
        flag: with which another path is given, for the error.

    Raises:
        ConfigError: it cannot be written, or is a file of another kind.
    """
    check_output(path, text, flag)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or a terminal
        else:
            replace_file(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"Cannot write {flag} {path}: {reason(error)}",
            fix=remedy(error, path, instead=f"give another path with {flag}", writing=True),
        ) from error


def check_output(path: Path, beginning: str, flag: str) -> None:
    """Check that a path is free, or that of an earlier output.

    Args:
        path: the file.
        beginning: at least the first two words of the output, by which an earlier one is recognized.
        flag: with which another path is given, for the error.

    Raises:
        ConfigError: it is a file of another kind, which the output would destroy.
    """
    if not path.is_file():
        return
    words = beginning.split(maxsplit=2)[:2]
    try:
        with path.open("rb") as file:
            head = file.read(COMPARED).decode(errors="replace")
    except OSError:
        head = "unreadable"
    if head and [word.lower() for word in head.split(maxsplit=2)[:2]] != [word.lower() for word in words]:
        raise ConfigError(
            f"Refusing to replace {flag} {path}, which is not an earlier output of this command: the file does not "
            f"begin with {' '.join(words)}",
            fix=f"Give another path with {flag}, or delete the file if its content is not needed",
        )
