"""Checksum verification of a checkpoint's files against its manifest, without torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_lite.runs.catalog import iteration_of
from megatron_lite.runs.manifest import CorruptCheckpointError, Manifest, SavedPart, read_manifest


def verify_checkpoint(path: Path) -> Manifest:
    """Read every byte of a checkpoint and return its manifest.

    Raises:
        CorruptCheckpointError: a file is missing or damaged, or the folder has the name of another iteration.
        CheckpointError: there is no manifest.
    """
    manifest = read_manifest(path)
    if iteration_of(path) not in (None, manifest.iteration):
        raise _corrupt(f"{path} holds iteration {manifest.iteration}, which is not that of its name")
    check_sizes(path, manifest, manifest.files)
    for name, file in manifest.files.items():
        verify_parts(path / name, file.parts)
    return manifest


def check_sizes(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check that files of a checkpoint are present with the size that its manifest states; read none of them.

    Raises:
        CorruptCheckpointError: a file is missing or has another size.
    """
    for name in names:
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise _unreadable(path / name, error) from error
        if size != manifest.files[name].size:
            raise _corrupt(f"{path / name} has {size} bytes instead of {manifest.files[name].size}")


def verify_parts(path: Path, parts: Sequence[SavedPart]) -> None:
    """Read parts of one file and compare their checksums.

    Raises:
        CorruptCheckpointError: as checked_parts.
    """
    for _ in checked_parts(path, parts):
        pass


def checked_parts(path: Path, parts: Sequence[SavedPart]) -> Iterator[memoryview]:
    """Read parts of a file and yield the bytes of each once its checksum is verified.

    All lie in one buffer: a part must be used before the next is taken.

    Raises:
        CorruptCheckpointError: the file cannot be read, ends early, or a checksum differs.
    """
    buffer = memoryview(bytearray(max((part.length for part in parts), default=0)))
    try:
        with path.open("rb", buffering=0) as file:
            for part in parts:
                view, done = buffer[: part.length], 0
                file.seek(part.start)
                # One call reads no more than 2 GiB, and less where a signal comes.
                while count := file.readinto(view[done:]):
                    done += count
                end = part.start + part.length
                if done < part.length:
                    raise _corrupt(f"{path} ends at byte {part.start + done}, in a part that ends at {end}")
                found = zlib.crc32(view)
                if found != part.crc32:
                    raise _corrupt(
                        f"{path} is damaged: bytes {part.start} to {end} have CRC-32 {found:08x}, the manifest states "
                        f"{part.crc32:08x}"
                    )
                yield view
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CorruptCheckpointError:
    return _corrupt(f"Cannot read {path}: {error.strerror}")


def _corrupt(problem: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        problem, fix="Load an earlier iteration (--load-iteration), or add --fallback-on-corrupt to do so automatically"
    )
