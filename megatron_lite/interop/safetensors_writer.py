"""Streaming safetensors writer: shards of bounded size; holds one slice of one tensor in memory at a time.

safetensors' own writer needs a whole shard in memory. The format is simple: the length of a JSON header, the header
(dtype, shape and byte range of every tensor), the bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.sources import TensorInfo, TensorSource
from megatron_lite.checkpoint.tiles import grid
from megatron_lite.rectangle import Rectangle

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_ALIGNMENT = 8


def write_safetensors(
    folder: Path, source: TensorSource, max_shard_size: int, progress: Callable[[int, int], None]
) -> list[str]:
    """Write all tensors of a source, in its order, and an index if there are several files.

    Args:
        folder: an existing folder.
        source: the tensors.
        max_shard_size: bytes of tensors that a file holds at most, unless a single tensor is larger.
        progress: called with the bytes written so far, and those of all tensors.

    Returns:
        The files' names.

    Raises:
        OSError: there is no room, no permission.
        CheckpointError: a tensor cannot be read, or is not finite.
    """
    shards = _shards(source.tensors, max_shard_size)
    sizes = {name: _size(info) for name, info in source.tensors.items()}
    total, done = sum(sizes.values()), 0
    files: dict[str, str] = {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.update(dict.fromkeys(names, file))
        _write_file(folder / file, source, names, advance)
    written = list(dict.fromkeys(files.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        written.append("model.safetensors.index.json")
    return written


def size_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of all tensors."""
    return sum(map(_size, tensors.values()))


def _size(info: TensorInfo) -> int:
    return info.full.numel * info.itemsize


def _shards(tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + _size(info) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(info)
    return shards


def _write_file(path: Path, source: TensorSource, names: Sequence[str], advance: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    position = 0
    for name in names:
        info = source.tensors[name]
        end = position + _size(info)
        header[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            for block in _row_blocks(source.tensors[name]):
                data = _bytes(source.read(name, block))
                file.write(data)
                advance(len(data))
        file.flush()
        os.fsync(file.fileno())


def _row_blocks(info: TensorInfo) -> Iterator[Rectangle]:
    """Yield blocks of complete rows, cut where a checkpoint's tiles are, so that each tile is read once."""
    shape = info.shape
    if not shape:
        yield info.full
        return
    extent, count = shape[0], grid(shape, info.itemsize)[0]
    for first, last in pairwise(number * extent // count for number in range(count + 1)):
        yield Rectangle((first, *info.full.offset[1:]), (last - first, *shape[1:]))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
