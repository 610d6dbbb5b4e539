"""Output files of commands: atomic writes, with errors that name the flag."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.errors import ConfigError
from megatron_lite.runs.atomic import replace_file
from megatron_lite.system_errors import reason, remedy


def write_output(path: Path, text: str, flag: str) -> None:
    """Write a text file, whose folder is created; an interrupted write leaves the old file.

    Args:
        path: the file.
        text: its content.
        flag: with which another path is given, for the error.

    Raises:
        ConfigError: it cannot be written.
    """
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
