"""Reader of small text files that users name: UTF-8, with or without a byte order mark, plain or compressed.

Prompts, texts to evaluate, argument files, blends, JSON configs and tokenizer files are read here. Preprocessing
streams its inputs (data/preparation/lines.py) with the same recognition of formats.
"""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import IO

from megatron_lite.config.paths import suggest_path
from megatron_lite.config.text_format import (
    BOM,
    HEAD,
    Packing,
    damage_errors,
    foreign_format,
    missing_library,
    packing_of,
    unpacked,
)
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy


class TextFileError(ValueError):
    """A file exists but is not readable text. The message continues a sentence that begins with the file's name.

    Attributes:
        fix: what to do, in the imperative and without full stop.
    """

    def __init__(self, problem: str, *, fix: str) -> None:
        self.fix = fix
        super().__init__(problem)


def read_text(path: str | Path) -> str:
    """Return the content of a text file. Line ends stay as they are; a byte order mark is dropped.

    Raises:
        OSError: the file is missing or cannot be opened, or is a directory.
        TextFileError: it is a pipe (other than the shell's <(command)) or a device, not UTF-8, holds NUL bytes, or is
            compressed and damaged.
    """
    with _open(path) as file:
        content = file.read()
    packing = packing_of(content)
    if packing is not None:
        content = _unpack(content, packing)
    return decode_text(content)


def decode_text(content: bytes) -> str:
    """Return UTF-8 text from a file's or a pipe's content, as `read_text`.

    Raises:
        TextFileError: as `read_text`.
    """
    if foreign := foreign_format(content[:HEAD]):
        raise TextFileError(f"is {foreign}, not plain UTF-8 text", fix=_conversion(foreign))
    content = content.removeprefix(BOM)
    place = content.find(b"\x00")
    if place >= 0:
        raise TextFileError(
            f"is not text: NUL byte in {_place(content, place)}",
            fix="Give a text file; this one is binary or damaged",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, where = content[error.start], _place(content, error.start)
        raise TextFileError(
            f"is not UTF-8: byte 0x{byte:02x} in {where}",
            fix="Convert the file to UTF-8, for example with iconv -f latin1 -t utf-8 (if latin1 is its encoding)",
        ) from None


def require_text(path: str | Path, flag: str) -> str:
    """Return the content of the text file that a flag names, as `read_text`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_text(path)
    except (OSError, TextFileError) as error:
        fix = read_fix(flag, str(path), error, f"give another {flag}")
        raise DataError(f"{flag} {read_failure(path, error)}", fix=fix) from error


def read_failure(path: str | Path, error: OSError | TextFileError) -> str:
    """Return why `read_text` failed, beginning with the file's name."""
    return f"{path} {error}" if isinstance(error, TextFileError) else f"{path}: {reason(error)}"


def read_fix(flag: str, path: str, error: OSError | TextFileError, instead: str) -> str:
    """Return the fix of an error about a text file that a flag names and that `read_text` could not read.

    Args:
        flag: the flag, before the path in suggestions.
        path: the file.
        error: raised by `read_text`.
        instead: another way out, in the imperative and without capital letter.
    """
    if isinstance(error, FileNotFoundError):
        return suggest_path(flag, path)
    if isinstance(error, OSError):
        return remedy(error, path, instead=instead)
    return f"{error.fix}, or {instead}"


def text_lines(text: str) -> list[str]:
    r"""Split at \n and \r\n only (str.splitlines also splits at form feeds, U+2028 and others)."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _open(path: str | Path) -> IO[bytes]:
    """Open a file; refuse what would block (a pipe without a writer) or never end (a device)."""
    shell = str(path).startswith(("/dev/fd/", "/proc/self/fd/")) or str(path) == "/dev/stdin"
    try:
        mode = Path(path).stat().st_mode
    except ValueError as error:  # a NUL byte or half a surrogate pair in the name
        raise TextFileError(f"has an impossible name: {error}", fix="Rename the file to a name in UTF-8") from None
    if not shell and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise TextFileError(
            "is a pipe, socket or device, not a regular file",
            fix="Write the contents to a regular file and give its path",
        )
    return Path(path).open("rb")


def _conversion(foreign: str) -> str:
    """Return how to make UTF-8 text of a file in a foreign format."""
    if foreign.startswith("UTF-"):
        return f"Convert the file with iconv -f {foreign.split()[0]} -t utf-8"
    if "archive" in foreign or "lz4" in foreign or "compress" in foreign:
        return "Unpack the file and give the text inside"
    return "Export the text to a plain text file"


def _unpack(content: bytes, packing: Packing) -> bytes:
    if library := missing_library(packing):
        raise TextFileError(
            f"is compressed with {packing}, and the Python module {library} that reads it is not installed",
            fix=f"Unpack the file ({packing} -d)" + (": pip install zstandard does, too" if packing == "zstd" else ""),
        )
    try:
        return unpacked(io.BytesIO(content), packing).read()
    except damage_errors(packing) as error:
        raise TextFileError(
            f"is compressed with {packing} and truncated or damaged ({error})",
            fix="Copy the file again from its source",
        ) from None


def _place(content: bytes, offset: int) -> str:
    line = content.count(b"\n", 0, offset) + 1
    column = offset - content.rfind(b"\n", 0, offset)
    return f"line {line}, byte {column} of the line, {offset + 1} of the file"
