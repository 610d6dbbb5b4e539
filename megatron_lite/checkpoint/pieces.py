"""Merge of all ranks' write records, with the check that every tensor element was written exactly once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_lite.errors import CheckpointError
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
    """What one rank brings to a save.

    Attributes:
        tensors: the pieces that it wrote; each SavedTensor holds this rank's pieces only.
        files: the files that it wrote.
        held: names of all tensors that it holds a part of, written by it or by another.
        error: why it could not write, in which case the rest is empty.
    """

    tensors: Mapping[str, SavedTensor] = field(default_factory=dict)
    files: Mapping[str, SavedFile] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    error: str = ""

    def encode(self) -> bytes:
        """The share as JSON, to be left in the folder for the rank that finishes the save."""
        content = {
            "tensors": {name: tensor_to_json(tensor) for name, tensor in self.tensors.items()},
            "files": {name: file_to_json(file) for name, file in self.files.items()},
            "held": self.held,
            "error": self.error,
        }
        return json.dumps(content).encode()

    @classmethod
    def decode(cls, data: bytes) -> Share:
        """The inverse of encode."""
        content: dict[str, Any] = json.loads(data)
        return cls(
            {name: tensor_from_json(tensor) for name, tensor in content["tensors"].items()},
            {name: file_from_json(file) for name, file in content["files"].items()},
            tuple(content["held"]),
            content["error"],
        )


def merge_shares(shares: Sequence[Share]) -> dict[str, SavedTensor]:
    """All pieces of all tensors.

    Raises:
        CheckpointError: a tensor has different shapes or dtypes on two ranks, or an element of it was written by
            nobody or twice.
    """
    merged: dict[str, SavedTensor] = {}
    for share in shares:
        for name, tensor in share.tensors.items():
            known = merged.get(name, SavedTensor(tensor.shape, tensor.dtype, ()))
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise _not_whole(
                    name, f"it is {known.dtype} {known.shape} on one rank and {tensor.dtype} {tensor.shape} on another"
                )
            merged[name] = SavedTensor(known.shape, known.dtype, known.pieces + tensor.pieces)
    for name in {name for share in shares for name in share.held} - merged.keys():
        raise _not_whole(name, "ranks hold it but none was told to write it")
    for name, tensor in merged.items():
        _check_whole(name, tensor)
    return merged


def _check_whole(name: str, tensor: SavedTensor) -> None:
    full = Rectangle.full(tensor.shape)
    if any(piece.rectangle.numel and piece.rectangle.intersection(full) != piece.rectangle for piece in tensor.pieces):
        raise _not_whole(name, f"a piece lies outside of its shape {tensor.shape}")
    # No overlap and the right total together mean that every element is there once.
    twice = _first_overlap(tensor.pieces)
    if twice:
        one, other = twice
        raise _not_whole(
            name, f"the pieces at {one.rectangle.offset} ({one.file}) and {other.rectangle.offset} overlap"
        )
    written = sum(piece.rectangle.numel for piece in tensor.pieces)
    if written != full.numel:
        raise _not_whole(name, f"{written} of {full.numel} elements were written")


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


def _not_whole(name: str, found: str) -> CheckpointError:
    return CheckpointError(
        "Each element of a tensor must be saved exactly once",
        found=f"{name}: {found}",
        fix="This is a fault in the program, not in the run: please report it with the parallel sizes",
    )
