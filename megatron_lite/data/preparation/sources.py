"""Input files of preprocessing, and their division into units of work by byte ranges."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lite.config.paths import suggest_path
from megatron_lite.config.text_format import HEAD, PARQUET, Packing, foreign_format, missing_library, packing_of
from megatron_lite.config.values import is_utf8, shown_bytes
from megatron_lite.data.preparation.options import MAX_UNIT, MIN_UNIT, UNITS
from megatron_lite.errors import DataError, install_extra
from megatron_lite.system_errors import reason, remedy

Kind = Literal["text", "parquet"] | Packing
KINDS: dict[str, Kind] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".parquet": "parquet",
}
"""Formats by file suffix, for files whose first bytes do not identify the format."""


@dataclass(frozen=True)
class Source:
    """Input file; the modification time detects changes between an interrupted run and its continuation."""

    path: str
    kind: Kind
    num_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Unit:
    """Unit of work: the lines that begin in bytes [start, end) of a file, or all lines of a compressed file."""

    number: int
    source: Source
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the unit."""
        return self.end - self.start


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Return the files of paths and globs in the order given; the files of a glob are sorted by name.

    Raises:
        DataError: a path does not exist or is a folder, a glob matches nothing, a file is given twice, the library for
            its format is not installed, or a compressed file is empty.
    """
    if not inputs:
        raise DataError("No input file is given (--input)", fix="Give --input FILE, one or more paths or globs")
    paths = [path for name in inputs for path in _expand(name)]
    seen: dict[str, str] = {}
    for path in paths:
        absolute = os.path.normpath(Path(path).absolute())
        if absolute in seen:
            other = f", also as {seen[absolute]}" if seen[absolute] != path else ""
            raise DataError(f"{path} is given more than once{other}", fix="Name the file once in --input")
        seen[absolute] = path
    return [_source(Path(path)) for path in paths]


def _expand(name: str) -> list[str]:
    if Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []  # noqa: PTH207, Path.glob is relative
    if not found:
        raise DataError(
            f"--input {name} {'matches no file' if glob.has_magic(name) else 'does not exist'}",
            fix=suggest_path("--input", name)
            if not glob.has_magic(name)
            else "Give a glob that matches files, or their paths",
        )
    return found


def _source(path: Path) -> Source:
    if not is_utf8(str(path)):
        raise DataError(
            f"The name of an --input file is not UTF-8: {shown_bytes(str(path))} (matched by a glob)",
            fix="Rename the file to a name in UTF-8, for example with convmv -f latin1 -t utf8 --notest FILE",
        )
    if path.is_dir():
        raise DataError(
            f"--input {path} is a folder", fix=f"Name the files in it, for example --input '{path}/*.jsonl'"
        )
    if not path.is_file():
        raise DataError(
            f"--input {path} is a pipe or a device",
            rule="An input must be a regular file, which several workers read in parts",
            fix="Write the content to a file and give that file to --input",
        )
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            status = path.stat()
    except OSError as error:
        raise DataError(
            f"Cannot read --input {path}: {reason(error)}",
            fix=remedy(error, path, instead="leave the file out of --input"),
        ) from error
    kind = _kind(path, head)
    if kind == "parquet":
        library = "" if importlib.util.find_spec("pyarrow") else "pyarrow"
    else:
        library = "" if kind == "text" else missing_library(kind)
    if library:
        raise DataError(
            f"Cannot read the {kind} file {path}: the Python module {library} is not installed",
            fix="Decompress the file, or use a Python that was built with this module"
            if library.startswith("_")
            else install_extra("data"),
        )
    if kind != "text" and not status.st_size:
        raise DataError(
            f"{path} is truncated: it has 0 bytes, and even an empty {path.suffix} file has some",
            fix="Copy or compress the file again, or leave it out of --input",
        )
    return Source(str(path), kind, status.st_size, status.st_mtime_ns)


def _conversion(foreign: str, path: Path) -> str:
    """Return how to convert a file in an unsupported format."""
    if foreign.startswith("UTF-"):
        return f"Convert the file: iconv -f {foreign.split()[0]} -t UTF-8 {path}"
    if any(word in foreign for word in ("archive", "lz4", "compress")):
        return "Unpack it and give the files inside to --input"
    return "Convert the file to JSON lines or Parquet"


def _kind(path: Path, head: bytes) -> Kind:
    """Return the format of a file by its first bytes, or else by its suffix.

    Raises:
        DataError: the format is not supported.
    """
    if head.startswith(PARQUET):
        return "parquet"
    if (packing := packing_of(head)) is not None:
        return packing
    kind = KINDS.get(path.suffix.lower(), "text")
    if kind == "text" and (foreign := foreign_format(head)):
        raise DataError(
            f"--input {path} is {foreign}",
            rule="Input files are JSON lines in UTF-8, plain or compressed with gzip, bz2, xz or zstd, or Parquet "
            "files",
            fix=_conversion(foreign, path),
        )
    return kind


def unit_size(sources: Sequence[Source], unit_bytes: int | None = None) -> int:
    """Return the bytes of a unit of plain text: `unit_bytes` if given, or else a 256th of the input within bounds."""
    total = sum(source.num_bytes for source in sources)
    return unit_bytes or min(max(total // UNITS, MIN_UNIT), MAX_UNIT)


def plan_units(sources: Sequence[Source], unit_bytes: int | None = None, limit: int | None = None) -> list[Unit]:
    """Divide the input into units, which depend only on the sizes of the files."""
    size = unit_size(sources, unit_bytes)
    left = sum(source.num_bytes for source in sources) if limit is None else limit
    units: list[Unit] = []
    for source in sources:
        step = size if source.kind == "text" else max(1, source.num_bytes)
        for start in range(0, source.num_bytes, step):
            end = min(start + step, source.num_bytes)
            if left > 0:
                units.append(Unit(len(units), source, start, end))
            left -= end - start
    return units
