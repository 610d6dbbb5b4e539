"""Checksum verification of a checkpoint's files against its manifest."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.runs.catalog import iteration_of
from megatron_lite.runs.manifest import CorruptCheckpointError, Manifest, SavedFile, SavedPart, read_manifest

if TYPE_CHECKING:
    from io import FileIO


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Reads every byte of a checkpoint and returns its manifest.

    Raises:
        CorruptCheckpointError: a file is missing or differs, by name, or the folder has the name of another iteration.
        CheckpointError: there is no manifest.
    """
    manifest = read_manifest(checkpoint)
    if iteration_of(checkpoint) not in (None, manifest.iteration):
        raise _corrupt(checkpoint, f"is that of iteration {manifest.iteration} under another name")
    verify_lengths(checkpoint, manifest.files)
    for name, file in manifest.files.items():
        verify_parts(checkpoint / name, file.parts)
    return manifest


def verify_lengths(checkpoint: Path, files: Mapping[str, SavedFile]) -> None:
    """Looks whether files are there and neither cut short nor longer than their parts; reads none of them.

    Raises:
        CorruptCheckpointError: one of them is or is not.
    """
    for name, file in files.items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        if size != file.size:
            raise _corrupt(path, f"has {size} bytes instead of {file.size}")


def verify_parts(path: Path, parts: Sequence[SavedPart]) -> None:
    """Reads parts of one file and compares their checksums.

    Raises:
        CorruptCheckpointError: one of them differs, or cannot be read.
    """
    if not parts:
        return
    buffer = memoryview(bytearray(max(part.length for part in parts)))
    with open_file(path) as file:
        for part in parts:
            read_part(file, path, part, buffer)


def open_file(path: Path) -> FileIO:
    """A file of a checkpoint, to read parts of it.

    Raises:
        CorruptCheckpointError: it cannot be opened.
    """
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_part(file: FileIO, path: Path, part: SavedPart, buffer: memoryview) -> memoryview:
    """Reads a part into the beginning of the buffer, which is as long or longer, and returns it once it is checked.

    Raises:
        CorruptCheckpointError: it cannot be read, ends early, or its checksum differs.
    """
    view, done = buffer[: part.length], 0
    try:
        file.seek(part.start)
        # One call reads no more than 2 GiB, and less where a signal comes.
        while count := file.readinto(view[done:]):
            done += count
    except OSError as error:
        raise _unreadable(path, error) from error
    if done < part.length:
        raise _corrupt(path, f"ends at byte {part.start + done}, in a part that ends at {part.start + part.length}")
    found = zlib.crc32(view)
    if found != part.crc32:
        where = f"bytes {part.start} to {part.start + part.length}"
        raise _corrupt(path, f"has other bytes than were written ({where}: CRC-32 {found:08x}, not {part.crc32:08x})")
    return view


def _unreadable(path: Path, error: OSError) -> CorruptCheckpointError:
    return _corrupt(path, f"cannot be read ({error.strerror})")


def _corrupt(path: Path, problem: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "Every file of a checkpoint must match its manifest",
        found=f"{path} {problem}",
        fix="Load an earlier iteration, or add --fallback-on-corrupt to do so automatically",
    )
