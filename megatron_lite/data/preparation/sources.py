"""Inputs of preprocessing (files, folders, archives), and their division into units of work by byte ranges."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_lite.config.paths import suggest_path
from megatron_lite.config.text_format import (
    HEAD,
    PARQUET,
    Packing,
    damage_errors,
    foreign_format,
    missing_library,
    packing_of,
    unpacked,
)
from megatron_lite.config.values import is_utf8, shown_bytes
from megatron_lite.data.preparation.options import MAX_UNIT, MIN_UNIT, UNITS, PlainText
from megatron_lite.data.preparation.text_files import RENAME, FolderListing, is_archive, list_folder
from megatron_lite.errors import DataError, install_extra
from megatron_lite.system_errors import reason, remedy

Kind = Literal["text", "parquet", "folder", "archive"] | Packing
KINDS: dict[str, Kind] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".parquet": "parquet",
    ".tar": "archive",
}
"""Formats by file suffix, for files whose first bytes do not identify the format."""


@dataclass(frozen=True)
class Source:
    """Input file or folder; the modification time detects changes between an interrupted run and its continuation."""

    path: str
    kind: Kind
    num_bytes: int
    changed_ns: int
    """Modification time; of a folder, a hash of the names, sizes and times of its files."""
    document: Literal["json", "line", "file"] = "json"
    """Form of a document: a JSON line (or a row of Parquet), a line, or a file."""
    listing: FolderListing | None = field(default=None, repr=False, compare=False)

    def identity(self) -> dict[str, Any]:
        """Return what the documents of the source depend on."""
        plain = {} if self.document == "json" else {"document": self.document}
        return {
            "path": self.path,
            "kind": self.kind,
            "num_bytes": self.num_bytes,
            "changed_ns": self.changed_ns,
        } | plain


@dataclass(frozen=True)
class Unit:
    """Unit of work: lines that begin in bytes [start, end) of a file, all lines of a compressed file, or some files."""

    number: int
    source: Source
    start: int
    end: int
    files: str = ""
    """Of a folder: the paths of the files, relative to it and separated by NUL."""

    @property
    def paths(self) -> list[str]:
        """Files that the unit reads."""
        if self.source.kind != "folder":
            return [self.source.path]
        return [f"{self.source.path}/{name}" for name in self.files.split("\0")]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the unit."""
        return self.end - self.start


def packing_in(kind: Kind) -> Packing | None:
    """Return the compression format of a kind of file; None for other formats."""
    match kind:
        case "gzip" | "bz2" | "xz" | "zstd":
            return kind
    return None


def find_sources(inputs: Sequence[str], plain_text: PlainText | None = None) -> list[Source]:
    """Return the files of paths and globs in the order given; the files of a glob are sorted by name.

    Args:
        inputs: paths and globs of files and folders.
        plain_text: form of the documents of files that are plain text; None: files are JSON lines.

    Raises:
        DataError: a path does not exist or is a folder without text files, a glob matches nothing, a file is given
            twice, the library for its format is not installed, or a compressed file is empty.
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
    return [_source(Path(path), plain_text) for path in paths]


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


def _source(path: Path, plain_text: PlainText | None) -> Source:
    if not is_utf8(str(path)):
        raise DataError(
            f"The name of an --input file is not UTF-8: {shown_bytes(str(path))} (matched by a glob)",
            fix=RENAME,
        )
    if path.is_dir():
        listing = list_folder(path)
        _check_plain_text(path, "folder", plain_text)
        return Source(str(path), "folder", sum(listing.sizes), listing.digest, "file", listing)
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
        library = missing_library(packing) if (packing := packing_in(kind)) else ""
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
    if (packing := packing_in(kind)) and is_archive(_unpacked_head(path, packing)):
        kind = "archive"
    _check_plain_text(path, kind, plain_text)
    document = "file" if kind == "archive" else plain_text or "json"
    return Source(str(path), kind, status.st_size, status.st_mtime_ns, document)


def _unpacked_head(path: Path, packing: Packing) -> bytes:
    """Return the first bytes of a compressed file's content; none if it is damaged: an error when it is read."""
    try:
        with path.open("rb") as raw, unpacked(raw, packing) as file:
            return file.read(HEAD)
    except damage_errors(packing):
        return b""


def _check_plain_text(path: Path, kind: Kind, plain_text: PlainText | None) -> None:
    """Check that --plain-text has a meaning for an input.

    Raises:
        DataError: the documents of the input have another form.
    """
    if plain_text is None or (kind in ("folder", "archive") and plain_text == "file"):
        return
    form = {
        "folder": "a folder, of which each .txt file is a document",
        "archive": "an archive, of which each .txt file is a document",
        "parquet": "a Parquet file, of which each row is a document",
    }.get(kind)
    if form is None:
        return
    raise DataError(
        f"--plain-text {plain_text} does not apply to --input {path}, {form}",
        fix=f"Preprocess {path} without --plain-text"
        + (f", or name its files: --input '{path}/*.txt'" if kind == "folder" else ""),
    )


def _conversion(foreign: str, path: Path) -> str:
    """Return how to convert a file in an unsupported format."""
    if foreign.startswith("UTF-"):
        command = f"iconv -f {foreign.split()[0]} -t UTF-8 {path} > {path}.utf8"
        return f"Convert the file, and give the new one to --input: `{command}`"
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
    if is_archive(head):
        return "archive"
    kind = KINDS.get(path.suffix.lower(), "text")
    if kind == "text" and (foreign := foreign_format(head)):
        raise DataError(
            f"--input {path} is {foreign}",
            rule="Input files are JSON lines or text in UTF-8, plain or compressed with gzip, bz2, xz or zstd, tar "
            "archives of .txt files, or Parquet files",
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
        bare, start = replace(source, listing=None), 0  # units are sent to workers
        for files, num_bytes in _parts(source, size):
            if left > 0:
                units.append(Unit(len(units), bare, start, start + num_bytes, files))
            start += num_bytes
            left -= num_bytes
    return units


def _parts(source: Source, size: int) -> Iterator[tuple[str, int]]:
    """Yield the files (of a folder) and the bytes of each unit of a source."""
    if source.listing is not None:
        yield from source.listing.parts(size)
        return
    step = size if source.kind == "text" and source.document != "file" else max(1, source.num_bytes)
    for start in range(0, source.num_bytes, step):
        yield "", min(step, source.num_bytes - start)
