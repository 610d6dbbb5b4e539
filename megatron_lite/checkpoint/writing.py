"""Shard writer: tensor rectangles in torch.distributed.checkpoint's (DCP's) file format, with checksums.

That format is a row of torch.save's records, one for each rectangle of a tensor, and `.metadata`, which says where each
lies; any torch reads such a folder without this package. Pieces are cut into tiles (tiles.py), and each record is a
part of its file with a checksum of its own. No collective runs here: a rank writes its own pieces, and save.py brings
the ranks together.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.serialization import config

from megatron_lite.checkpoint.dcp_metadata import dcp_metadata, dtype_name
from megatron_lite.checkpoint.pieces import Share
from megatron_lite.checkpoint.tiles import tiles
from megatron_lite.parallel.tensors import GlobalTensor, narrow
from megatron_lite.rectangle import Rectangle
from megatron_lite.runs.atomic import write_synced
from megatron_lite.runs.manifest import SavedFile, SavedPart, SavedPiece, SavedTensor

DCP_METADATA_NAME = ".metadata"
_BUFFER = 1 << 20
_HEADERS = 1 << 12
"""More than what a record is longer than its elements."""


def write_pieces(folder: Path, tensors: Sequence[GlobalTensor], rank: int) -> Share:
    """Writes the pieces that this rank is the writer of, in one file of the folder, and waits for the disk.

    Raises:
        OSError: no room, no permission; what was written so far stays in the folder.
    """
    with PieceWriter(folder, rank) as writer:
        for tensor in tensors:
            if not tensor.write:
                continue
            for piece in tensor.pieces:
                data = piece.tensor.detach()
                for tile in tiles(tensor.global_shape, data.element_size(), piece.rectangle):
                    writer.write(tensor.name, tensor.global_shape, tile, narrow(data, tile.relative_to(piece.offset)))
    return writer.share(tuple(tensor.name for tensor in tensors))


def write_dcp_metadata(folder: Path, tensors: Mapping[str, SavedTensor], files: Mapping[str, SavedFile]) -> SavedFile:
    """Writes `.metadata`, by which torch.distributed.checkpoint alone can read the folder.

    Raises:
        OSError: no room, no permission.
    """
    data = pickle.dumps(dcp_metadata(tensors, files))
    write_synced(folder / DCP_METADATA_NAME, data)
    return SavedFile((SavedPart(0, len(data), zlib.crc32(data)),))


class PieceWriter:
    """Writes rectangles of tensors one by one, and knows afterwards what lies where.

    A context manager: leaving it without an error waits for the disk.

    Args:
        folder: of the checkpoint, as long as it is partial.
        rank: whose files they are; no two writers of a folder have the same.
        file_size: bytes that no file exceeds, unless a single record does; None: there is one file.
    """

    def __init__(self, folder: Path, rank: int, file_size: int | None = None) -> None:
        self._folder = folder
        self._rank = rank
        self._file_size = file_size
        self._file: _ChecksummedFile | None = None
        self._files: dict[str, SavedFile] = {}
        self._tensors: dict[str, SavedTensor] = {}

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._file is not None:
            if kind is None:
                self._finish(self._file)
            else:
                self._file.close()

    def write(self, name: str, global_shape: Sequence[int], rectangle: Rectangle, tensor: Tensor) -> None:
        """Adds a record.

        Args:
            name: of the global tensor.
            global_shape: its shape.
            rectangle: the part of it that is written.
            tensor: the rectangle's values, on any device.

        Raises:
            OSError: no room, no permission.
        """
        file = self._open(tensor.nbytes)
        file.save(_own_storage(tensor.detach().cpu()))
        piece = SavedPiece(rectangle, file.path.name, len(file.parts) - 1)
        known = self._tensors.get(name)
        pieces = (*known.pieces, piece) if known else (piece,)
        self._tensors[name] = SavedTensor(tuple(global_shape), dtype_name(tensor.dtype), pieces)

    def share(self, held: tuple[str, ...]) -> Share:
        """What was written, once the context is left; `held` as in Share."""
        return Share(self._tensors, self._files, held)

    def _open(self, length: int) -> _ChecksummedFile:
        limit = self._file_size
        if self._file is not None and limit is not None and self._file.size + length + _HEADERS > limit:
            self._finish(self._file)
        if self._file is None:
            # DCP's own names: rank, and number of the rank's file.
            self._file = _ChecksummedFile(self._folder / f"__{self._rank}_{len(self._files)}.distcp")
        return self._file

    def _finish(self, file: _ChecksummedFile) -> None:
        with file:
            file.flush()
            os.fsync(file.fileno())
        self._files[file.path.name] = SavedFile(tuple(file.parts))
        self._file = None


class _ChecksummedFile(io.BufferedWriter):
    """A file that knows the length and CRC-32 of each record, so that nothing is read back."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path, "wb"), _BUFFER)
        self.path = path
        self.parts: list[SavedPart] = []
        self.size = 0
        self._crc32 = 0

    def save(self, tensor: Tensor) -> None:
        """Adds a tensor's record.

        Raises:
            OSError: no room.
        """
        start, self._crc32 = self.size, 0
        try:
            # Our own checksum covers the record, so torch need not compute its slower one as well.
            with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                torch.save(tensor, self)
        except RuntimeError as error:
            # Where a write fails or Ctrl-C comes, torch.save complains about its unfinished file instead.
            if error.__context__ is None:
                raise
            raise error.__context__ from None
        self.parts.append(SavedPart(start, self.size - start, self._crc32))

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        super().write(view)
        self.size += len(view)
        self._crc32 = zlib.crc32(view, self._crc32)
        return len(view)


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor without what else lies in its storage, all of which torch.save would write; a copy if it has gaps."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).reshape(tensor.shape)
