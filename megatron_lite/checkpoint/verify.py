"""Compares the bytes of a checkpoint with what its manifest says, and names the file that differs."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from megatron_lite.checkpoint.manifest import CorruptCheckpointError, Manifest, SavedFile, read_manifest

_BLOCK = 1 << 22


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Reads every byte of a checkpoint and returns its manifest.

    Raises:
        CorruptCheckpointError: a file is missing or differs, by name.
        CheckpointError: there is no manifest.
    """
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest, manifest.files)
    return manifest


def verify_files(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Reads the named files.

    Raises:
        CorruptCheckpointError: one of them is missing or differs.
    """
    for name in names:
        problem = file_problem(checkpoint / name, manifest.files[name])
        if problem:
            raise CorruptCheckpointError(
                "Every file of a checkpoint must match its manifest",
                found=f"{checkpoint / name} {problem}",
                fix="Load an earlier iteration, or add --fallback-on-corrupt to do so automatically",
            )


def file_problem(path: Path, expected: SavedFile) -> str | None:
    """What is wrong with a file, as the end of a sentence, or None."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"has {size} bytes instead of {expected.size}"
        found = checksum(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found != expected.crc32:
        return f"has other bytes than were written (CRC-32 {found:08x} instead of {expected.crc32:08x})"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    crc = 0
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(view[:count], crc)
    return crc
