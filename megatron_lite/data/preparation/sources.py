"""Input files of preprocessing, split into units of work by byte ranges."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lite.config.text_format import HEAD, PARQUET, Packing, foreign_format, missing_library, packing_of
from megatron_lite.config.values import is_utf8, shown_bytes
from megatron_lite.data.preparation.options import MAX_UNIT, MIN_UNIT, UNITS
from megatron_lite.errors import DataError, install_extra

Kind = Literal["text", "parquet"] | Packing
KINDS: dict[str, Kind] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".parquet": "parquet",
}
"""Formats by a file's ending, for files whose first bytes announce none."""


@dataclass(frozen=True)
class Source:
    """An input file. Its time of change tells a continued run that it is not the file it began with."""

    path: str
    kind: Kind
    num_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Unit:
    """One worker's errand: the lines that begin in bytes [start, end) of a file; of a packed file, all of it."""

    number: int
    source: Source
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that this unit reads."""
        return self.end - self.start


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that paths and globs name, in the order given (a glob's files sorted by name).

    Raises:
        DataError: a path does not exist or is a folder, a glob matches nothing, a file is named twice, its library is
            not installed, or it is packed and has no bytes.
    """
    if not inputs:
        raise DataError("Preprocessing needs input", found="no --input is given", fix="Give --input FILE …")
    paths = [path for name in inputs for path in _expand(name)]
    seen: dict[str, str] = {}
    for path in paths:
        place = os.path.normpath(Path(path).absolute())
        if place in seen:
            other = f", as {seen[place]} too" if seen[place] != path else ""
            raise DataError(
                "Each input file is read once",
                found=f"{path} is named more than once{other}",
                fix="Name it once in --input",
            )
        seen[place] = path
    return [_source(Path(path)) for path in paths]


def _expand(name: str) -> list[str]:
    if Path(name).exists():
        return [name]
    found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []  # noqa: PTH207, Path.glob is relative
    if not found:
        raise DataError(
            "Every --input exists",
            found=f"{name} {'matches no file' if glob.has_magic(name) else 'does not exist'}",
            fix="Give the paths of the files, or a glob in quotes",
        )
    return found


def _source(path: Path) -> Source:
    if not is_utf8(str(path)):
        raise DataError(
            "Names of --input files are UTF-8",
            found=f"{shown_bytes(str(path))} (matched by a glob)",
            fix="Rename the file to a name in UTF-8, as with `convmv -t utf8`",
        )
    if path.is_dir():
        raise DataError(
            "--input names files", found=f"{path} is a folder", fix=f"Name its files, for example '{path}/*.jsonl'"
        )
    if not path.is_file():
        raise DataError(
            "--input names files, which workers read from any place",
            found=f"{path} is a pipe or a device",
            fix="Write its content to a file and name that",
        )
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            status = path.stat()
    except OSError as error:
        raise DataError(
            "Every --input can be read",
            found=f"{path}: {error.strerror}",
            fix=f"Make it readable, as with chmod u+r {path}",
        ) from error
    kind = _kind(path, head)
    library = _missing_library(kind)
    if library:
        raise DataError(
            f"{kind} files are read with the {library} library",
            found=f"{path} is one, and {library} is not installed",
            fix="Unpack the file, or use a Python that was built with this library"
            if library.startswith("_")
            else install_extra("data"),
        )
    if kind != "text" and not status.st_size:
        raise DataError(
            "A packed input must be whole",
            found=f"{path} has no bytes, not even those of an empty {path.suffix}",
            fix="Copy or pack the file again, or leave it out of --input",
        )
    return Source(str(path), kind, status.st_size, status.st_mtime_ns)


def _kind(path: Path, head: bytes) -> Kind:
    """The format of a file: what its first bytes announce, else what its ending says.

    Raises:
        DataError: it is neither text nor in a format that is read here.
    """
    if head.startswith(PARQUET):
        return "parquet"
    if (packing := packing_of(head)) is not None:
        return packing
    kind = KINDS.get(path.suffix.lower(), "text")
    if kind == "text" and (foreign := foreign_format(head)):
        raise DataError(
            "--input names UTF-8 JSON lines, plain or compressed (gzip, bz2, xz, zstd), or Parquet files",
            found=f"{path} is {foreign}",
            fix="Convert it: iconv -t UTF-8 for text, unpack an archive",
        )
    return kind


def _missing_library(kind: Kind) -> str:
    if kind == "parquet":
        return "" if importlib.util.find_spec("pyarrow") else "pyarrow"
    return "" if kind == "text" else missing_library(kind)


def unit_size(sources: Sequence[Source], unit_bytes: int | None = None) -> int:
    """Bytes of a unit of plain text: `unit_bytes` if given, else a share of the input within bounds."""
    total = sum(source.num_bytes for source in sources)
    return unit_bytes or min(max(total // UNITS, MIN_UNIT), MAX_UNIT)


def plan_units(sources: Sequence[Source], unit_bytes: int | None = None, limit: int | None = None) -> list[Unit]:
    """Cut the input into units: a function of the files' sizes alone."""
    size = unit_size(sources, unit_bytes)
    left = sum(source.num_bytes for source in sources) if limit is None else limit
    units: list[Unit] = []
    for source in sources:
        for start, end in _ranges(source, size):
            if left > 0:
                units.append(Unit(len(units), source, start, end))
            left -= end - start
    return units


def _ranges(source: Source, size: int) -> Iterator[tuple[int, int]]:
    if source.kind != "text":
        yield 0, source.num_bytes
        return
    for start in range(0, source.num_bytes, size):
        yield start, min(start + size, source.num_bytes)
