"""Reader of Megatron-LM torch_dist checkpoints: weights from .distcp files, by the names and shapes in .metadata.

Layers of one kind are stacked into one tensor, [layers, …], or have a number in their name. `.metadata` is a pickle of
torch.distributed.checkpoint's classes; it is read by the restricted unpickler, and so is each record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_shape
from megatron_lite.interop.megatron.arrangements import CURRENT_VERSION
from megatron_lite.interop.megatron.found import Found
from megatron_lite.interop.megatron.naming import CORE_TE, NO_PARAMETERS, detect, split_layer
from megatron_lite.interop.megatron.shards import Part
from megatron_lite.interop.megatron.state_dicts import (
    arguments_of,
    mapping_of,
    original_vocab_size,
    scheduler_of,
    version_of,
)
from megatron_lite.interop.pickle_names import METADATA
from megatron_lite.interop.sources import read_json
from megatron_lite.interop.unpickling import Stub, map_file, read_pickle, read_torch_file, read_torch_record
from megatron_lite.parallel.tensors import narrow
from megatron_lite.rectangle import Rectangle
from megatron_lite.system_errors import reason, remedy

_OTHERS = re.compile(r"(optimizer|rng_state|opt_param_scheduler|rerun_state_machine|args|iteration)\b.*")
"""Keys that are no weights; the optimizer's are in the shapes of its buckets, which depend on the layout."""
_STACKED = re.compile(r"(.*\blayers)\.(?!\d+\.)(.+)")


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a tensor, and the bytes of the file that hold it."""

    rectangle: Rectangle
    file: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class _Stored:
    """A tensor of `.metadata`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


def read_torch_dist(folder: Path, *, version: float | None = None, with_optimizer: bool = True) -> Found:
    """Read a torch_dist checkpoint's files but for the values of its tensors.

    Args:
        folder: iter_….
        version: must be 3.0, or None.
        with_optimizer: whether to note that the optimizer's state is left out.

    Raises:
        CheckpointError: a file is missing or damaged, or of another backend.
    """
    if (folder / "metadata.json").is_file():
        backend = read_json(folder / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(
                f"{folder / 'metadata.json'} has sharded_backend={backend!r}; of the distributed formats, only "
                "torch_dist can be read",
                fix=f"Convert it in a Megatron-LM that reads {backend}: start its pretrain_gpt.py with the run's flags "
                f"and --load {folder.parent} --ckpt-convert-format torch --ckpt-convert-save FOLDER; then "
                "import FOLDER",
            )
    common_path = folder / "common.pt"
    common = mapping_of(read_torch_file(common_path), common_path) if common_path.is_file() else {}
    arguments = arguments_of(common)
    stored = _read_metadata(folder)
    parts = {}
    for key, tensor in stored.items():
        name = key.removeprefix("model.").removeprefix("module.")
        if not _OTHERS.fullmatch(name) and not NO_PARAMETERS.fullmatch(name):
            parts.update({own: [part] for own, part in _unstacked(folder, name, tensor)})
    files = _Files(folder)
    raw = {key: _part(files, tensor, None) for key, tensor in stored.items()}
    numbers = {layer[1] for name in parts if (layer := split_layer(name))}
    scheme = detect(parts) if parts else CORE_TE
    # A tied model's head is stored once, as the embedding's table, so a table of its own means that it is untied.
    return Found(
        folder=folder,
        where=str(common_path if arguments is not None else folder),
        scheme=scheme,
        parts=parts,
        num_layers=len(numbers),
        arguments=arguments,
        iteration=int(common.get("iteration") or 0),
        raw=raw,
        version=version_of(common, str(common_path), version, CURRENT_VERSION),
        vocab_size=original_vocab_size(common, arguments),
        scheduler=scheduler_of(common),
        content=common,
        notes=[f"{folder} is in the torch_dist format: only weights are imported"] if with_optimizer else [],
    )


def _read_metadata(folder: Path) -> dict[str, _Stored]:
    """Return the tensors that `.metadata` describes.

    Raises:
        CheckpointError: it is missing or damaged, or its chunks do not cover a tensor.
    """
    path = folder / ".metadata"
    metadata = read_pickle(path, METADATA)
    try:
        tensors, storage = metadata.state["state_dict_metadata"], metadata.state["storage_data"]
        places = {(key.state["fqn"], tuple(key.state.get("offset") or ())): info.state for key, info in storage.items()}
        found = {name: _stored(name, entry, places) for name, entry in tensors.items() if "size" in (entry.state or {})}
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged, or does not describe tensors: {type(error).__name__}: {error}",
            fix="Copy the checkpoint folder again",
        ) from error
    for name, tensor in found.items():
        covered = sum(chunk.rectangle.numel for chunk in tensor.chunks)
        if covered != prod(tensor.shape):
            raise CheckpointError(
                f"{path} is damaged: the tensor {name} has {prod(tensor.shape):,} elements, but its parts have "
                f"{covered:,}",
                fix="Copy the checkpoint folder again",
            )
    return found


def _stored(name: str, entry: Stub, places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]) -> _Stored:
    dtype = _dtype(entry.state["properties"].state)
    chunks = []
    for chunk in entry.state["chunks"]:
        offset, shape = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
        place = places[name, offset]
        if Path(place["relative_path"]).name != place["relative_path"]:
            raise CheckpointError(
                f".metadata of the checkpoint names the file {place['relative_path']}, which is outside the "
                "checkpoint's folder",
                fix="Do not use this checkpoint: it may be made to read other files. Copy it again from its run",
            )
        chunks.append(_Chunk(Rectangle(offset, shape), place["relative_path"], place["offset"], place["length"]))
    return _Stored(tuple(entry.state["size"]), dtype, tuple(chunks))


def _dtype(properties: Any) -> torch.dtype:
    """Return the dtype of a TensorProperties' state, a tuple or, in other versions, a dict."""
    dtype = properties["dtype"] if isinstance(properties, Mapping) else properties[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a dtype that is {dtype!r}")
    return dtype


def _unstacked(folder: Path, name: str, tensor: _Stored) -> Iterator[tuple[str, Part]]:
    """Yield a tensor, or the tensors of every layer that are stacked in it."""
    files, match = _Files(folder), _STACKED.fullmatch(name)
    if match is None:
        yield name, _part(files, tensor, None)
        return
    for number in range(tensor.shape[0]):
        yield f"{match[1]}.{number}.{match[2]}", _part(files, tensor, number)


class _Files:
    """The folder's .distcp files, memory-mapped when they are first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, Tensor] = {}

    def record(self, chunk: _Chunk) -> Tensor:
        """Return the tensor of a record.

        Raises:
            CheckpointError: the file is missing or damaged, or the record holds something else.
        """
        path = self.folder / chunk.file
        if chunk.file not in self._mapped:
            try:
                self._mapped[chunk.file] = map_file(path)
            except OSError as error:
                raise CheckpointError(
                    f"Cannot read {path}: {reason(error)}",
                    fix=remedy(error, path, instead="copy this file again"),
                ) from error
        data = self._mapped[chunk.file]
        tensor = read_torch_record(path, data[chunk.start : chunk.start + chunk.length])
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != chunk.rectangle.shape:
            raise CheckpointError(
                f"{path} is damaged: at byte {chunk.start:,} there is no tensor of the shape "
                f"{format_shape(chunk.rectangle.shape)}, "
                "which .metadata states",
                fix="Copy the checkpoint folder again",
            )
        return tensor


def _part(files: _Files, stored: _Stored, layer: int | None) -> Part:
    """Return a tensor, or one layer of it, put together from its chunks on demand."""
    shape = stored.shape if layer is None else stored.shape[1:]
    chunks = [chunk for chunk in stored.chunks if layer is None or _holds(chunk, layer)]

    def load() -> Tensor:
        out = None
        for chunk in chunks:
            record = files.record(chunk)
            place = chunk.rectangle
            if layer is not None:
                record = record[layer - place.offset[0]]
                place = Rectangle(place.offset[1:], place.shape[1:])
            if len(chunks) == 1:
                return record
            out = torch.empty(shape, dtype=stored.dtype) if out is None else out
            narrow(out, place).copy_(record)
        assert out is not None
        return out

    return Part(str(files.folder), shape, stored.dtype, load, is_mapped=False)


def _holds(chunk: _Chunk, layer: int) -> bool:
    place = chunk.rectangle
    return place.offset[0] <= layer < place.offset[0] + place.shape[0]
