"""Checkpoint metadata merging: combines all ranks' lists of written slices, finds missing or doubled elements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_lite.errors import CheckpointError, report_bug
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.manifest import (
    SavedFile,
    SavedPiece,
    SavedTensor,
    file_from_json,
    file_to_json,
    tensor_from_json,
    tensor_to_json,
)


@dataclass(frozen=True)
class Share:
    """Write record of one rank.

    Attributes:
        tensors: the pieces that it wrote; each SavedTensor holds this rank's pieces only.
        files: the files that it wrote.
        held: names of all tensors of which the rank holds a part, written by this rank or by another.
        error: why writing failed, in which case the rest is empty.
    """

    tensors: Mapping[str, SavedTensor] = field(default_factory=dict)
    files: Mapping[str, SavedFile] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    error: str = ""

    def encode(self) -> bytes:
        """Return the record as JSON, which is left in the folder for rank 0."""
        content = {
            "tensors": {name: tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "files": {name: file_to_json(file) for name, file in self.files.items()},
            "held": self.held,
            "error": self.error,
        }
        return json.dumps(content).encode()

    @classmethod
    def decode(cls, data: bytes) -> Share:
        """Return the record of some JSON; the inverse of encode."""
        content: dict[str, Any] = json.loads(data)
        return cls(
            {name: tensor_from_json(tensor) for name, tensor in content["tensors"].items()},
            {name: file_from_json(file) for name, file in content["files"].items()},
            tuple(content["held"]),
            content["error"],
        )


def merge_shares(shares: Sequence[Share]) -> dict[str, SavedTensor]:
    """Return every tensor with the pieces of all ranks.

    Raises:
        CheckpointError: a tensor has different shapes or dtypes on two ranks, or one of its elements was written
            by no rank or twice.
    """
    merged: dict[str, SavedTensor] = {}
    for share in shares:
        for name, tensor in share.tensors.items():
            known = merged.get(name, SavedTensor(tensor.shape, tensor.dtype, ()))
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise _incomplete(
                    name,
                    f"it is {known.dtype} {known.shape} on one rank and {tensor.dtype} {tensor.shape} on another",
                )
            merged[name] = SavedTensor(known.shape, known.dtype, known.pieces + tensor.pieces)
    for name in {name for share in shares for name in share.held} - merged.keys():
        raise _incomplete(name, "ranks hold it, but none writes it")
    for name, tensor in merged.items():
        _check_complete(name, tensor)
    return merged


def dcp_metadata(tensors: Mapping[str, SavedTensor], files: Mapping[str, SavedFile]) -> Metadata:
    """Return shapes, chunks and their places in the files as DCP stores them in `.metadata`.

    It serves other programs: the file is a pickle, and our own loads, which execute nothing, read the manifest.
    """
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, tensor in tensors.items():
        places = [piece.rectangle for piece in tensor.pieces]
        chunks = [ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.shape)) for place in places]
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        state[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for piece in tensor.pieces:
            part = files[piece.file].parts[piece.part]
            storage[MetadataIndex(name, piece.rectangle.offset)] = _StorageInfo(piece.file, part.start, part.length)
    # planner_data states how torch's own converters nest the names in a dict: not at all.
    return Metadata(state, planner_data={name: (name,) for name in tensors}, storage_data=storage)


def _check_complete(name: str, tensor: SavedTensor) -> None:
    full = Rectangle.full(tensor.shape)
    if any(piece.rectangle.numel and piece.rectangle.intersection(full) != piece.rectangle for piece in tensor.pieces):
        raise _incomplete(name, f"a piece lies outside of the tensor's shape {tensor.shape}")
    # Without overlaps, the right total means that every element was written once.
    twice = _first_overlap(tensor.pieces)
    if twice:
        one, other = twice
        raise _incomplete(
            name, f"shards overlap at offset {other.rectangle.offset}, one in {one.file} at {one.rectangle.offset}"
        )
    written = sum(piece.rectangle.numel for piece in tensor.pieces)
    if written != full.numel:
        raise _incomplete(name, f"{written} of {full.numel} elements were written")


def _first_overlap(pieces: Sequence[SavedPiece]) -> tuple[SavedPiece, SavedPiece] | None:
    ordered = sorted(pieces, key=lambda piece: piece.rectangle.offset)
    for number, piece in enumerate(ordered):
        mine = piece.rectangle
        end = mine.offset[0] + mine.shape[0] if mine.offset else 1
        for other in ordered[number + 1 :]:
            if other.rectangle.offset and other.rectangle.offset[0] >= end:
                break
            if mine.intersection(other.rectangle) is not None:
                return piece, other
    return None


def _incomplete(name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f'Cannot save the tensor "{name}": {problem}',
        rule="Each element of a tensor must be saved exactly once",
        fix=report_bug("This checkpoint is not complete; earlier ones are untouched"),
    )
