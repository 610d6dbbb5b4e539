"""Checkpoint manifest (manifest.json): tensors, files, checksums, config and progress of a checkpoint."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_lite.config.record import from_record
from megatron_lite.errors import CheckpointError
from megatron_lite.rectangle import Rectangle
from megatron_lite.schedules.data_order import DataSegment
from megatron_lite.system_errors import reason, remedy

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
_TAIL = ',\n"crc32": "{:08x}"\n}}\n'
_TAIL_LENGTH = len(_TAIL.format(0))


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or differs from the manifest in size or content."""


@dataclass(frozen=True)
class SavedPiece:
    """Rectangle of a saved tensor, and the bytes of the file that hold it.

    Attributes:
        rectangle: of the global tensor.
        file: name inside the checkpoint's folder.
        part: which of the file's parts holds it, counted from 0.
    """

    rectangle: Rectangle
    file: str
    part: int


@dataclass(frozen=True)
class SavedTensor:
    """A global tensor: its logical shape, its dtype as torch spells it without the prefix, and its pieces."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[SavedPiece, ...]


@dataclass(frozen=True)
class SavedPart:
    """A range of a file's bytes with a checksum of its own, so that it can be read and verified alone."""

    start: int
    length: int
    crc32: int


@dataclass(frozen=True)
class SavedFile:
    """A file as a sequence of parts: one per piece, or a single one."""

    parts: tuple[SavedPart, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.parts[-1].start + self.parts[-1].length if self.parts else 0


@dataclass(frozen=True)
class Provenance:
    """Origin of a checkpoint, with which a resume compares itself.

    Attributes:
        config: the full RunConfig, as dataclasses.asdict gives it.
        fingerprints: short hashes of what the run depends on beyond its config: `tokenizer`, `code`, one entry per
            source of the data (`data source 1`) and one for their order. See check_fingerprints.
        skipped_samples: ranges [first, end) of samples that a rollback skips.
        data_history: data read so far, by segment, and their order; empty in checkpoints of earlier versions.
        sources: short hash of each source file of the program; empty in checkpoints of earlier versions.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    skipped_samples: tuple[tuple[int, int], ...] = ()
    data_history: tuple[DataSegment, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json. `scalars` is the rest of the state: progress, loss scaler, step counts."""

    iteration: int
    tensors: Mapping[str, SavedTensor]
    files: Mapping[str, SavedFile]
    scalars: Mapping[str, Any]
    provenance: Provenance
    writer: Mapping[str, Any]
    """Package and torch versions, number of ranks, and time (seconds since 1970) of the save."""

    @property
    def size(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(file.size for file in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json: JSON whose last key is the CRC-32 of all bytes before it.

    Raises:
        CheckpointError: a scalar or config value is not JSON.
    """
    content = {
        "format": "megatron_lite",
        "format_version": FORMAT_VERSION,
        "iteration": manifest.iteration,
        "writer": dict(manifest.writer),
        "scalars": dict(manifest.scalars),
        "provenance": asdict(manifest.provenance),
        "files": {name: file_to_json(file) for name, file in sorted(manifest.files.items())},
        "tensors": {name: tensor_to_json(tensor) for name, tensor in sorted(manifest.tensors.items())},
    }
    try:
        # One top-level key a line: 30,000 pieces stay a few megabytes, and the head can still be read with `less`.
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The state of this run cannot be stored in a checkpoint's manifest.json, which is JSON: {_fault(content)}",
            fix="If code of your own saves this entry, save numbers, strings, lists and dicts as scalars, and tensors "
            "as tensors; otherwise report a bug of megatron_lite",
        ) from error
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + _TAIL.format(zlib.crc32(body)).encode()


def _fault(content: Any, name: str = "") -> str:
    """Return the first entry that is not JSON, and its type."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        place = f"{name}.{key}" if name else str(key)
        if not isinstance(key, str | int | float | None):
            return f"the key {place} is of type {type(key).__name__}"
        try:
            json.dumps(value)
        except TypeError:
            return _fault(value, place)
        except ValueError:
            return f"{place} contains itself"
    return f"{name} is of type {type(content).__name__}"


def decode_manifest(data: bytes, path: Path) -> Manifest:
    """Inverse of encode_manifest; `path` is for the error only.

    Raises:
        CorruptCheckpointError: the checksum does not match.
        CheckpointError: another program's file, or another version of the format.
    """
    body, tail = data[:-_TAIL_LENGTH], data[-_TAIL_LENGTH:]
    if tail != _TAIL.format(zlib.crc32(body)).encode():
        raise CorruptCheckpointError(
            f"{path} is damaged: its {len(data):,} bytes do not match their checksum",
            fix="Load an earlier iteration (--load-iteration), or add --fallback-on-corrupt to do so automatically",
        )
    content = json.loads(data)
    if content.get("format") != "megatron_lite" or content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r} version {content.get('format_version')}; this version of "
            "megatron_lite reads "
            f"{'' if content.get('format') == 'megatron_lite' else 'format megatron_lite '}version {FORMAT_VERSION}",
            fix="Load it with the megatron_lite that wrote it: "
            + content.get("writer", {}).get("megatron_lite", "of an earlier version")
            if content.get("format") == "megatron_lite"
            else "Give a checkpoint that megatron_lite wrote",
        )
    provenance = content["provenance"]
    return Manifest(
        iteration=content["iteration"],
        tensors={name: tensor_from_json(tensor) for name, tensor in content["tensors"].items()},
        files={name: file_from_json(file) for name, file in content["files"].items()},
        scalars=content["scalars"],
        provenance=Provenance(
            config=provenance["config"],
            fingerprints=provenance["fingerprints"],
            skipped_samples=tuple((first, end) for first, end in provenance["skipped_samples"]),
            data_history=tuple(from_record(DataSegment, segment) for segment in provenance.get("data_history", ())),
            sources=provenance.get("sources", {}),
        ),
        writer=content["writer"],
    )


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of one checkpoint's folder.

    Raises:
        CheckpointError: the folder or its manifest does not exist, or has another format.
        CorruptCheckpointError: the manifest is damaged.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {reason(error)}",
            fix=remedy(
                error,
                path,
                instead="give the folder iter_… of a checkpoint (`megatron-lite checkpoint list RUN` lists those of a "
                "run)",
            ),
        ) from error
    return decode_manifest(data, path)


def tensor_to_json(tensor: SavedTensor) -> list[Any]:
    """Return shape, dtype and pieces as plain lists."""
    pieces = [[piece.rectangle.offset, piece.rectangle.shape, piece.file, piece.part] for piece in tensor.pieces]
    return [tensor.shape, tensor.dtype, pieces]


def tensor_from_json(content: list[Any]) -> SavedTensor:
    """Inverse of tensor_to_json."""
    shape, dtype, pieces = content
    return SavedTensor(
        shape=tuple(shape),
        dtype=dtype,
        pieces=tuple(
            SavedPiece(Rectangle(tuple(offset), tuple(extent)), file, part) for offset, extent, file, part in pieces
        ),
    )


def file_to_json(file: SavedFile) -> list[Any]:
    """Return length and checksum of each part; the start follows from the lengths."""
    return [[part.length, f"{part.crc32:08x}"] for part in file.parts]


def file_from_json(content: list[Any]) -> SavedFile:
    """Inverse of file_to_json."""
    starts = accumulate((length for length, _ in content), initial=0)
    return SavedFile(
        tuple(SavedPart(start, length, int(crc32, 16)) for start, (length, crc32) in zip(starts, content, strict=False))
    )
