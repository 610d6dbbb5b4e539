"""Reads a rank's pieces from the rectangles that any other layout wrote, through torch.distributed.checkpoint (DCP).

No collective runs here: a rank reads what its own pieces need, and load.py brings the ranks together.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_lite.checkpoint.dcp_metadata import dcp_metadata
from megatron_lite.checkpoint.manifest import SavedTensor
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.tensors import GlobalTensor


@dataclass(frozen=True)
class Read:
    """A tensor to fill and the saved tensor to fill it from; their names differ where one stands in for another."""

    target: GlobalTensor
    source: str


def read_pieces(folder: Path, saved: Mapping[str, SavedTensor], reads: Sequence[Read]) -> None:
    """Fills the targets' pieces, converting to their dtype and device.

    Raises:
        CheckpointError: a saved tensor does not cover a piece.
        OSError: a file cannot be read.
    """
    metadata = dcp_metadata({read.source: saved[read.source] for read in reads})
    planner = _PieceLoadPlanner(reads, metadata)
    plan = planner.create_local_plan()
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(plan, planner).wait()


class _PieceLoadPlanner(LoadPlanner):
    """The parts of saved pieces that fill this rank's pieces.

    DCP reads a saved piece anew for each part of it that is asked for. So where one saved piece fills several parts
    (of a rank's pieces under ZeRO, or of a weight and its main parameter), it is asked for once, whole, and handed out.
    """

    def __init__(self, reads: Sequence[Read], metadata: Metadata) -> None:
        self._metadata = metadata
        # By number, not by name: a rank may hold a tensor twice, as the two ends of a tied embedding do.
        self._pieces = {
            MetadataIndex(str(number), piece.offset): piece.tensor.detach()
            for number, read in enumerate(reads)
            for piece in read.target.pieces
        }
        self._parts: dict[MetadataIndex, list[ReadItem]] = {}
        for number, read in enumerate(reads):
            for item in self._items(number, read):
                self._parts.setdefault(item.storage_index, []).append(item)

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([parts[0] if len(parts) == 1 else self._whole(index) for index, parts in self._parts.items()])

    def _items(self, number: int, read: Read) -> Iterator[ReadItem]:
        pieces = [piece for piece in read.target.pieces if piece.tensor.numel()]
        if not pieces:
            return
        chunks = [ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape) for piece in pieces]
        items = create_read_items_for_chunk_list(read.source, self._saved(read.source), chunks)
        found, wanted = sum(item.lengths.numel() for item in items), sum(piece.tensor.numel() for piece in pieces)
        if found != wanted:
            raise CheckpointError(
                "A checkpoint must hold every element of a tensor",
                found=f"{read.source} has {found} of the {wanted} elements that this rank needs",
                fix="Load another iteration; this one was put together wrongly",
            )
        for item in items:
            yield replace(item, dest_index=MetadataIndex(str(number), item.dest_index.offset))

    def _saved(self, name: str) -> TensorStorageMetadata:
        saved = self._metadata.state_dict_metadata[name]
        assert isinstance(saved, TensorStorageMetadata)
        return saved

    def _whole(self, index: MetadataIndex) -> ReadItem:
        shape = next(chunk.sizes for chunk in self._saved(index.fqn).chunks if chunk.offsets == index.offset)
        origin = torch.Size([0] * len(shape))
        part = self._parts[index][0]
        return replace(part, dest_offsets=origin, storage_offsets=origin, lengths=shape)

    def _part(self, item: ReadItem) -> Tensor:
        return _narrow(self._pieces[item.dest_index], item.dest_offsets, item.lengths)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        if len(self._parts[read_item.storage_index]) == 1:
            return self._part(read_item)
        return torch.empty(read_item.lengths, dtype=self._saved(read_item.storage_index.fqn).properties.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        parts = self._parts[read_item.storage_index]
        for part in parts if len(parts) > 1 else ():
            self._part(part).copy_(_narrow(tensor, part.storage_offsets, part.lengths))

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """The tensors were given at construction."""

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError("ranks plan for themselves")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are stored")


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
