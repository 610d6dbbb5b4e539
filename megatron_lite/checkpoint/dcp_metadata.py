"""DCP metadata of the manifest's tensors, by which torch.distributed.checkpoint alone can read the folder."""

from __future__ import annotations

from collections.abc import Mapping
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

from megatron_lite.runs.manifest import SavedFile, SavedTensor


def dcp_metadata(tensors: Mapping[str, SavedTensor], files: Mapping[str, SavedFile]) -> Metadata:
    """Shapes, chunks and their places in the files, as DCP keeps them in `.metadata`.

    It is written for others: that file is a pickle, and a load of ours, which should execute nothing, reads the
    manifest.
    """
    state: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, tensor in tensors.items():
        chunks = [
            ChunkStorageMetadata(torch.Size(p.rectangle.offset), torch.Size(p.rectangle.shape)) for p in tensor.pieces
        ]
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        state[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for piece in tensor.pieces:
            part = files[piece.file].parts[piece.part]
            storage[MetadataIndex(name, piece.rectangle.offset)] = _StorageInfo(piece.file, part.start, part.length)
    # planner_data says how torch's own converters nest the names in a dict: not at all.
    return Metadata(state, planner_data={name: (name,) for name in tensors}, storage_data=storage)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`: float32."""
    return str(dtype).removeprefix("torch.")
