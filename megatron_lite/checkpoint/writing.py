"""Writes a rank's pieces in torch.distributed.checkpoint's (DCP's) file format, with a checksum as the bytes go by.

DCP plans and writes rectangles ("chunks"); here is its planner for GlobalTensors. No collective runs here: a rank
writes its own pieces, and save.py brings the ranks together. The folder also gets DCP's own `.metadata`, so that any
torch can read it without this package.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from megatron_lite.checkpoint.dcp_metadata import dcp_metadata, dtype_name
from megatron_lite.checkpoint.manifest import SavedFile, SavedPiece, SavedTensor
from megatron_lite.checkpoint.pieces import Share
from megatron_lite.parallel.tensors import GlobalTensor

DCP_METADATA_NAME = ".metadata"
_BUFFER = 1 << 20


def write_pieces(folder: Path, tensors: Sequence[GlobalTensor], rank: int) -> Share:
    """Writes the pieces that this rank is the writer of, in one file of the folder, and waits for the disk.

    Raises:
        OSError: no room, no permission; what was written so far stays in the folder.
    """
    planner = _PieceSavePlanner(tensors)
    plan = planner.create_local_plan()
    held = tuple(tensor.name for tensor in tensors)
    if not plan.items:
        return Share(held=held)
    file_system = _ChecksummingFileSystem()
    writer = _file_writer(folder, file_system)
    # The writer names files by the rank's place in the list of plans; ours are made without the other ranks.
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]
    try:
        # Our own checksum covers the file, so torch need not compute its slower one for each record as well.
        with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
            results: list[WriteResult] = writer.write_data(plan, planner).wait()
    except RuntimeError as error:
        # torch.save reports a failed write of its stream as a RuntimeError; the stream knows the reason.
        raise file_system.error or error from error
    pieces: dict[str, list[SavedPiece]] = {}
    for result in results:
        where, shape = result.storage_data, planner.piece(result.index).shape
        pieces.setdefault(result.index.fqn, []).append(
            SavedPiece(tuple(result.index.offset or ()), tuple(shape), where.relative_path, where.offset, where.length)
        )
    shapes = {tensor.name: tensor for tensor in tensors}
    saved = {
        name: SavedTensor(shapes[name].global_shape, dtype_name(shapes[name].dtype), tuple(parts))
        for name, parts in pieces.items()
    }
    return Share(saved, file_system.files, held)


def write_dcp_metadata(folder: Path, tensors: Mapping[str, SavedTensor]) -> SavedFile:
    """Writes `.metadata`, by which torch.distributed.checkpoint alone can read the folder.

    Raises:
        OSError: no room, no permission.
    """
    metadata = dcp_metadata(tensors)
    results = [WriteResult(index, where.length, where) for index, where in metadata.storage_data.items()]
    file_system = _ChecksummingFileSystem()
    _file_writer(folder, file_system).finish(metadata, [results])
    (written,) = file_system.files.values()
    return written


def _file_writer(folder: Path, file_system: _ChecksummingFileSystem) -> FileSystemWriter:
    # One thread: with more, the writer drops an exception of any but the first.
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs = file_system
    return writer


class _ChecksummedFile(io.BufferedWriter):
    """A file that knows the CRC-32 and number of the bytes given to it, so that nothing is read back."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(FileIO(path, "wb"), _BUFFER)
        self.saved = SavedFile(0, 0)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            super().write(view)
        except OSError as error:
            self.error = error
            raise
        self.saved = SavedFile(self.saved.size + len(view), zlib.crc32(view, self.saved.crc32))
        return len(view)


class _ChecksummingFileSystem(FileSystem):
    """DCP's local file system, remembering the length and checksum of every file written."""

    def __init__(self) -> None:
        self.files: dict[str, SavedFile] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        file = _ChecksummedFile(path)
        try:
            with file:
                yield file
        finally:
            self.error = file.error
        self.files[Path(path).name] = file.saved


class _PieceSavePlanner(SavePlanner):
    """Every non-empty piece of the tensors that this rank is the writer of."""

    def __init__(self, tensors: Sequence[GlobalTensor]) -> None:
        self._pieces: dict[MetadataIndex, tuple[GlobalTensor, Tensor]] = {
            MetadataIndex(tensor.name, piece.offset): (tensor, piece.tensor)
            for tensor in tensors
            if tensor.write
            for piece in tensor.pieces
            if piece.tensor.numel()
        }

    def piece(self, index: MetadataIndex) -> Tensor:
        return self._pieces[index][1]

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(index, *entry) for index, entry in self._pieces.items()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        # A transposed or strided view would be stored with its strides; the storage layer clones what is a part of a
        # larger storage, so that a file never holds more than the piece.
        return self.piece(write_item.index).detach().contiguous()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """The tensors were given at construction."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("ranks plan for themselves")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan


def _write_item(index: MetadataIndex, tensor: GlobalTensor, data: Tensor) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(index.offset or ()), data.shape)
    properties = TensorProperties(dtype=data.dtype)
    return WriteItem(
        index,
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(tensor.global_shape)),
    )
