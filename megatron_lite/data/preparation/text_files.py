"""Text file reader: .txt files of folders and tar archives, also compressed and nested, each one a document."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, cast

from megatron_lite.config.text_format import BUFFER, HEAD, damage_errors, packing_of, unpacked
from megatron_lite.config.values import is_utf8, shown_bytes
from megatron_lite.errors import DataError
from megatron_lite.system_errors import reason, remedy

SHOWN = 200
"""Bytes kept of a line or file that is too long."""

MAX_DEPTH = 8
"""Archives and compressed files inside each other; a few bytes can unpack to themselves forever."""

COPY_AGAIN = "Copy or compress the file again, or leave it out of --input"

RENAME = "Rename the file to a name in UTF-8, for example with convmv -f latin1 -t utf8 --notest FILE"

_PACKED = r"\.(gz|bz2|xz|lzma|zst)"
_IS_TEXT = re.compile(r"\.txt$", re.IGNORECASE).search
_PACKED_END = re.compile(rf"{_PACKED}$", re.IGNORECASE)
_MAY_HOLD_TEXT = re.compile(rf"(\.txt|\.tar|\.t(gz|bz2?|xz|zst)|{_PACKED})$", re.IGNORECASE).search


class TextFile(NamedTuple):
    """One file of a folder or an archive."""

    name: str
    """Path of the file, behind those of the folder and the archives that contain it."""
    content: bytes | None
    """Its bytes; None if the file is no .txt file."""
    too_long: bool
    """The file exceeds the maximum; `content` is its beginning."""


@dataclass(frozen=True)
class FolderListing:
    """Files of a folder and its subfolders that are .txt files or may be archives of them.

    Attributes:
        names: [folders] relative paths of the files of each subfolder, sorted and separated by NUL; this takes a
            fraction of the memory of a list.
        sizes: [files] their bytes.
        digest: hash of names, sizes and modification times, of 63 bits.
        ignored: number of other files.
    """

    names: list[str]
    sizes: array[int]
    digest: int
    ignored: int

    def parts(self, size: int) -> Iterator[tuple[str, int]]:
        """Yield names (separated by NUL) and bytes of consecutive files, of about `size` bytes each."""
        part, filled, sizes = list[str](), 0, iter(self.sizes)
        for names in self.names:
            for name in names.split("\0"):
                part.append(name)
                filled += next(sizes)
                if filled >= size:
                    yield "\0".join(part), filled
                    part, filled = [], 0
        if part:
            yield "\0".join(part), filled


def list_folder(folder: Path) -> FolderListing:
    """Return the text files of a folder: subfolder by subfolder, sorted; hidden files and linked folders are left out.

    Raises:
        DataError: the folder cannot be read, or has no such file, or one whose name is not UTF-8.
    """
    found, sizes, digest, others = list[str](), array("q"), hashlib.sha256(), Counter[str]()
    try:
        for parent, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            chosen = sorted(name for name in files if _MAY_HOLD_TEXT(name) and not name.startswith("."))
            if len(chosen) < len(files):
                others.update(Path(name).suffix for name in set(files).difference(chosen))
            names = []
            for name in chosen:
                path = f"{parent}/{name}"
                if not is_utf8(path):
                    raise DataError(
                        f"The name of a file in --input {folder} is not UTF-8: {shown_bytes(path)}",
                        fix=RENAME,
                    )
                status = os.stat(path)  # noqa: PTH116, for millions of files
                names.append(os.path.relpath(path, folder))
                sizes.append(status.st_size)
                digest.update(f"{names[-1]}\0{status.st_size} {status.st_mtime_ns}\n".encode())
            if names:
                found.append("\0".join(names))
    except OSError as error:
        raise DataError(
            f"Cannot read --input {folder}: {reason(error)}",
            fix=remedy(error, folder, instead="leave the folder out of --input"),
        ) from error
    if not found:
        raise _without_text(folder, others)
    return FolderListing(found, sizes, int.from_bytes(digest.digest()[:8], "big") >> 1, others.total())


def _raise(error: OSError) -> None:
    raise error


def _without_text(folder: Path, others: Counter[str]) -> DataError:
    if not others:
        return DataError(
            f"--input {folder} is a folder without files",
            fix="Give the folder that has the .txt files or archives, or the path of a file",
        )
    suffix = others.most_common(1)[0][0]
    plain = "" if suffix in (".jsonl", ".json", ".parquet") else " --plain-text file"
    return DataError(
        f"--input {folder} is a folder without .txt files or archives: it has {others.total():,} other files"
        + (f", most of them {suffix}" if suffix else ""),
        rule="Of a folder, each .txt file is a document",
        fix=f"Name the files to read, for example --input '{folder}/*{suffix}'{plain}",
    )


def is_archive(head: bytes) -> bool:
    """Return whether the first HEAD bytes of a file are those of a tar archive."""
    if head[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def read_text_files(name: str, stream: IO[bytes], limit: int, inner: str = "") -> Iterator[TextFile]:
    """Yield the .txt files of a tar archive or compressed archive, in order; a .txt file is its only file.

    Args:
        name: path of the file, for names and errors.
        stream: its content.
        limit: maximum bytes of a .txt file.
        inner: name from whose suffixes the file is recognized; empty: `name`.

    Raises:
        DataError: the archive, or one inside it, is truncated or damaged.
        OSError: reading failed.
    """
    yield from _read(name, inner or name, stream, limit, 0)


def _read(name: str, inner: str, stream: IO[bytes], limit: int, depth: int) -> Iterator[TextFile]:
    """Yield the text files of a file; `inner` is its name without suffixes of compression."""
    if _IS_TEXT(inner):
        content = stream.read(limit + 1)
        too_long = len(content) > limit
        yield TextFile(name, content[:SHOWN] if too_long else content, too_long)
        return
    head = stream.read(HEAD)
    packing = packing_of(head)
    if packing is None and not (is_archive(head) or inner.lower().endswith(".tar")):
        yield TextFile(name, None, False)
        return
    if depth == MAX_DEPTH:
        raise DataError(
            f"{name} is packed more than {MAX_DEPTH} times",
            rule="An archive in archives is read to this depth",
            fix="Unpack the outer archives and give the files inside to --input",
        )
    whole = cast("IO[bytes]", _Rewound(head, stream))
    if packing is None:
        yield from _read_members(name, whole, limit, depth + 1)
        return
    try:
        with unpacked(whole, packing) as unpacked_stream:
            yield from _read(name, _PACKED_END.sub("", inner), unpacked_stream, limit, depth + 1)
    except damage_errors(packing) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk
        raise _damaged(name, error) from error


def _read_members(name: str, stream: IO[bytes], limit: int, depth: int) -> Iterator[TextFile]:
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                if member.isdir():
                    continue
                path = f"{name}/{member.name.removeprefix('./') if is_utf8(member.name) else shown_bytes(member.name)}"
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or member.name.rpartition("/")[2].startswith("."):
                    yield TextFile(path, None, False)
                else:
                    yield from _read(path, member.name, content, limit, depth)
                archive.members = []  # type: ignore[attr-defined]  # it would grow with each member
            while rest := stream.read(BUFFER):  # to the end of a compressed stream, which has its checksum
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("data follow the end of the archive")
    except tarfile.TarError as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: BaseException) -> DataError:
    return DataError(f"{name} is truncated or damaged: {str(error).rstrip('.')}", fix=COPY_AGAIN)


class _Member(tarfile.TarInfo):
    """Member of an archive; a damaged or missing header is an error and not the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset:,} of the archive") from error


class _Rewound:
    """Readable file of which the first bytes, `head`, are read already."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes; -1: all."""
        if not self._head:
            return self._stream.read(size)
        if size < 0:
            size = len(self._head) + (1 << 62)
        found, self._head = self._head[:size], self._head[size:]
        return found if self._head else found + self._stream.read(size - len(found))
