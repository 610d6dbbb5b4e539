"""Weight file readers: safetensors and PyTorch pickle files, in one file or sharded with an index.

A source is a TensorSource (checkpoint/sources.py): names, shapes and dtypes, and rectangles read on demand. Files stay
memory-mapped, so a source costs memory only for what is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lite.checkpoint.sources import TensorInfo, TensorSource
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.unpickling import read_torch_file
from megatron_lite.parallel.tensors import narrow
from megatron_lite.rectangle import Rectangle
from megatron_lite.system_errors import reason, remedy

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLES = "pytorch_model.bin"
PICKLES_INDEX = "pytorch_model.bin.index.json"


class FileTensors(Protocol):
    """Tensors of one file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the file."""

    def get(self, name: str) -> Tensor:
        """Return a tensor that is memory-mapped from the file."""


class SafetensorsFile:
    """Tensors of one .safetensors file.

    The file is mapped anew for each tensor: what was read of one mapping stays resident until the mapping goes.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.tensors = {name: _info(file, name, path) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def get(self, name: str) -> Tensor:
        """Return a tensor."""
        from safetensors import safe_open

        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class PickleFile:
    """Tensors of one .bin or .pt file that holds a dict of tensors; mapped anew for each, as SafetensorsFile is."""

    def __init__(self, path: Path) -> None:
        content = read_torch_file(path)
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(
                f"{path} contains {_described(content)} instead of a dict of tensors by name",
                fix="Give a file that save_pretrained or torch.save(model.state_dict()) wrote",
            )
        self._path = path
        self.tensors = {name: info_of(tensor) for name, tensor in content.items()}

    def get(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = read_torch_file(self._path)[name]
        return tensor


class FolderSource:
    """Tensors of a folder's weight files, as a TensorSource; each file is opened when it is first needed.

    Args:
        files: the file of each tensor, by the tensor's name; None: one file, all of whose tensors are meant.
        folder: where they lie.
        names: the files' names.
        open_file: reads one of them.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        open_file: Callable[[Path], FileTensors],
        files: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        opened = {name: open_file(_existing(folder / name)) for name in names}
        self._file_of: dict[str, FileTensors] = {}
        for file_name, file in opened.items():
            for tensor in file.tensors:
                if files is not None and files.get(tensor) != file_name:
                    raise CheckpointError(
                        f"The index does not belong to the weights: {folder / file_name} contains the tensor "
                        f"{tensor}, which the index "
                        + (f"lists in {files[tensor]}" if tensor in files else "does not list"),
                        fix="Download the folder again",
                    )
                self._file_of[tensor] = file
        for tensor, file_name in (files or {}).items():
            if tensor not in self._file_of:
                raise CheckpointError(
                    f"The index does not belong to the weights: it lists the tensor {tensor} in {folder / file_name}, "
                    "which does not "
                    "contain it",
                    fix="Download the folder again",
                )
        self._tensors = {name: file.tensors[name] for name, file in self._file_of.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the files."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle of a tensor, a view of the memory-mapped file."""
        return narrow(self._file_of[name].get(name), rectangle)


def open_hugging_face(folder: Path) -> TensorSource:
    """Return the tensors of a Hugging Face model's folder; safetensors win over pickles, as in transformers.

    Raises:
        CheckpointError: there are no weights, a shard is missing or damaged, or the index is not of this folder.
    """
    kinds: tuple[tuple[str, str, Callable[[Path], FileTensors]], ...] = (
        (SAFETENSORS, SAFETENSORS_INDEX, SafetensorsFile),
        (PICKLES, PICKLES_INDEX, PickleFile),
    )
    for single, index, open_file in kinds:
        if (folder / single).is_file():
            return FolderSource(folder, [single], open_file)
        if (folder / index).is_file():
            files = _read_index(folder / index)
            return FolderSource(folder, sorted(set(files.values())), open_file, files)
    raise CheckpointError(
        f"{folder} contains no weights: there is none of {SAFETENSORS}, {SAFETENSORS_INDEX}, {PICKLES}, "
        f"{PICKLES_INDEX}",
        fix="Download the whole repository (hf download NAME), or give the folder that contains the weights",
    )


def info_of(tensor: Tensor) -> TensorInfo:
    """Return a tensor's shape and dtype."""
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        CheckpointError: it is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"its content is a JSON {'list' if isinstance(content, list) else 'value'}")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {reason(error)}"
            if isinstance(error, OSError)
            else f"{path} is empty"
            if not path.stat().st_size
            else f"{path} is not a JSON object: {error}",
            fix=remedy(error, path, instead="download the file again")
            if isinstance(error, OSError)
            else "Download or write the file again",
        ) from error
    return content


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(
            f"{path} has no weight_map, which lists the file of each tensor",
            fix="Download the file again",
        )
    outside = sorted({name for name in files.values() if Path(name).name != name or name in ("", ".", "..")})
    if outside:
        raise CheckpointError(
            f"{path} names the file {outside[0]!r}, which is not in the model's folder",
            rule="Such an index may have been made to have other files read",
            fix="Do not load this copy; download the model again from its author's own page",
        )
    return files


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing",
            fix="Download the model again (hf download NAME continues an interrupted download)",
        )
    return path


_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def _info(file: Any, name: str, path: Path) -> TensorInfo:
    part = file.get_slice(name)
    dtype = part.get_dtype()
    if dtype not in _SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"The tensor {name} in {path} has the dtype {dtype}, which PyTorch does not have",
            fix="Use an unquantized version of the model",
        )
    return TensorInfo(tuple(part.get_shape()), _SAFETENSORS_DTYPES[dtype])


def _damaged(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, OSError) and error.errno is not None:
        fix = remedy(error, path, instead="download the file again")
        return CheckpointError(f"Cannot read {path}: {reason(error)}", fix=fix)
    return CheckpointError(f"{path} is damaged: {error}", fix="Copy or download the file again")


def _described(content: object) -> str:
    if isinstance(content, Mapping):
        other = next((name for name, value in content.items() if not isinstance(value, torch.Tensor)), "")
        return f"{other!r}, a {type(content[other]).__name__}"
    return f"a {type(content).__name__}"
