"""Restricted unpickler for PyTorch files: builds tensors and plain values, and calls nothing that the file names.

pickle resolves every class and function that a file names, and calls it. Here a name is looked up in a table of exact
names instead: each stands for a builder of this module, for a plain container, or for a stub that keeps its arguments.
Nothing is imported on a file's behalf. A name outside the table is an error that quotes it, so a file that names
`os.system` is refused before anything of it is used. Both formats of torch.save are read: the zip archive and the
legacy stream of pickles; storages are memory-mapped, so a file costs memory only where its tensors are read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_lite.checkpoint.reading import BytesView
from megatron_lite.errors import CheckpointError
from megatron_lite.interop.pickle_names import STUBBED
from megatron_lite.system_errors import reason, remedy

_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a legacy file (torch.serialization.MAGIC_NUMBER)."""
_PROTOCOL = 1001

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "Untyped": torch.uint8,
    }.items()
}
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2"),
)


class Stub:
    """Inert stand-in for an object of a class that is not imported: keeps what the file says of it.

    Attributes:
        name: the class's full name.
        args: arguments of its construction (an enum's value is its only argument).
        state: what was set on it afterwards, as the file has it.
        items: elements appended or set, for subclasses of list and dict.
    """

    name = ""

    def __new__(cls, *args: Any, **_: Any) -> Stub:
        """Keep the arguments."""
        stub = super().__new__(cls)
        stub.args = args
        stub.state = None
        stub.items = []
        return stub

    def __init__(self, *_: Any, **__: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an element."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Keep elements."""
        self.items.extend(values)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.name} {self.args}>"


class Values:
    """Attributes of an argparse.Namespace or a types.SimpleNamespace."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class _Storage:
    """A storage that a file names: its key, its type, and its bytes; None: they are not read."""

    def __init__(self, key: str, data: Tensor | None, dtype: torch.dtype) -> None:
        self.key = key
        self.data = data
        self.dtype = dtype


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a view of a storage's bytes; arguments as torch._utils._rebuild_tensor_v2 takes them."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if storage.data is None:
        tensor = torch.empty_strided(size, stride, dtype=storage.dtype, device="meta")
        tensor._storage_key = storage.key  # type: ignore[attr-defined]
        return tensor
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if 0 not in size else -1
    elements = storage.data.numel() // storage.dtype.itemsize
    if offset < 0 or last >= elements or min((*size, *stride), default=0) < 0:
        raise pickle.UnpicklingError(f"a tensor of shape {size} reaches beyond its storage of {elements} elements")
    base = storage.data.view(storage.dtype)
    return base.as_strided(size, stride, base.storage_offset() + offset)  # as_strided counts from the file's start


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return bytes, as _codecs.encode does; pickle protocol 2 spells them so."""
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


_BUILDERS: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": tuple,
    "_codecs.encode": _encode,
    "argparse.Namespace": Values,
    "types.SimpleNamespace": Values,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES if hasattr(torch, name)},
}
"""Exact names, and what stands for each."""


class _Unpickler(pickle.Unpickler):
    """pickle.Unpickler that resolves names by the tables above, and storages by a function."""

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        storage: Callable[[tuple[Any, ...]], _Storage],
        stubbed: Collection[str] = (),
    ) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self._storage = storage
        self._stubbed = STUBBED | set(stubbed)
        self._stubs: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name.

        Raises:
            CheckpointError: it is not in the tables.
        """
        # Pickle protocol 2, torch.save's, spells names as Python 2 had them.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in _BUILDERS:
            return _BUILDERS[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if full in self._stubbed:
            return self._stubs.setdefault(full, type("Stub", (Stub,), {"name": full}))
        raise CheckpointError(
            f"{self._path} names {full}, which was not executed",
            rule="Only tensors and plain Python values are read from a pickle, since others could run code",
            fix="If you trust the source of the file, save it again without that object, or the weights as "
            "safetensors; "
            "otherwise do not load it with any program",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a persistent id names."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"a persistent id that is no storage: {pid!r}")
        return self._storage(pid)


def read_torch_file(path: Path, without: Collection[str] = ()) -> Any:
    """Return the object that torch.save wrote, with tensors that are memory-mapped from the file.

    Unknown harmless classes are Stub objects, Namespaces are Values; see the module's docstring.

    Args:
        path: the file.
        without: keys of the dict in the file whose tensors are not needed. Storages of legacy files that are not
            aligned cannot be mapped; those of these keys are left out, and their tensors are on the meta device.

    Raises:
        CheckpointError: the file is missing, damaged, or names something that is neither tensor nor plain value.
    """
    with _explained(path):
        data = map_file(path)
        return _read_zip(path, data) if zipfile.is_zipfile(path) else _read_legacy(path, data, without)


def read_torch_record(path: Path, data: Tensor) -> Any:
    """Return the object that torch.save wrote into a part of a file.

    Args:
        path: the file, for messages.
        data: the part's bytes, a view of map_file's result; tensors are memory-mapped from them.

    Raises:
        CheckpointError: as read_torch_file.
    """
    with _explained(path):
        return _read_zip(path, data)


def read_pickle(path: Path, stubbed: Collection[str]) -> Any:
    """Return the object of a plain pickle without tensors.

    Args:
        path: the file.
        stubbed: exact names of further harmless classes, whose objects become stubs.

    Raises:
        CheckpointError: as read_torch_file.
    """
    with _explained(path), path.open("rb") as file:
        return _Unpickler(file, path, _no_storage, stubbed).load()


def map_file(path: Path) -> Tensor:
    """Return a file's bytes, memory-mapped privately: nothing that is done to them reaches the file.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if not size:
        raise OSError("the file is empty")
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into an error that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        fix = remedy(error, path, instead="copy or download the file again")
        raise CheckpointError(f"Cannot read {path}: {reason(error)}", fix=fix) from error
    except Exception as error:  # a damaged pickle raises whatever its next byte happens to mean
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _read_zip(path: Path, data: Tensor) -> Any:
    with zipfile.ZipFile(BytesView(data.numpy().data)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        (pickled,) = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        root = pickled.removesuffix("data.pkl")
        order = archive.read(root + "byteorder").decode() if root + "byteorder" in members else "little"
        if order != "little":
            raise pickle.UnpicklingError(f"its bytes are in {order}-endian order")

        def storage(pid: tuple[Any, ...]) -> _Storage:
            dtype, key = _dtype(pid[1]), str(pid[2])
            info = members[f"{root}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"storage {key} is compressed")
            # A member starts with its local header: 30 bytes, of which the last four are two lengths.
            name, extra = struct.unpack("<HH", bytes(data[info.header_offset + 26 : info.header_offset + 30].tolist()))
            start = info.header_offset + 30 + name + extra
            if start + info.file_size > len(data):
                raise pickle.UnpicklingError(f"storage {key} ends beyond the file")
            return _Storage(key, _aligned(data[start : start + info.file_size], dtype), dtype)

        with archive.open(pickled) as file:
            return _Unpickler(io.BytesIO(file.read()), path, storage).load()


def _no_storage(pid: tuple[Any, ...]) -> _Storage:
    raise pickle.UnpicklingError(f"a storage where none belongs: {pid!r}")


def _read_legacy(path: Path, data: Tensor, without: Collection[str]) -> Any:
    """Return the object of a file from before torch 1.6: pickles, then each storage as its length and its bytes.

    The pickles come first and do not say where the storages lie, so they are read twice.
    """
    found: dict[str, torch.dtype] = {}

    def note(pid: tuple[Any, ...]) -> _Storage:
        key, dtype = str(pid[2]), _dtype(pid[1])
        found[key] = dtype
        return _Storage(key, None, dtype)

    with path.open("rb") as file:
        if _Unpickler(file, path, _no_storage).load() != _MAGIC:
            raise pickle.UnpicklingError("it is not a file of torch.save")
        if _Unpickler(file, path, _no_storage).load() != _PROTOCOL:
            raise pickle.UnpicklingError("it has an unknown version of torch.save's legacy format")
        system = _Unpickler(file, path, _no_storage).load()
        if not system.get("little_endian", True):
            raise pickle.UnpicklingError("its bytes are in big-endian order")
        begin = file.tell()
        content = _Unpickler(file, path, note).load()
        if without and isinstance(content, Mapping):
            needed = set(_storage_keys([value for name, value in content.items() if name not in without]))
        else:
            needed = set(found)
        keys = _Unpickler(file, path, _no_storage).load()
        position, storages = file.tell(), {}
        for key in map(str, keys):
            (count,) = struct.unpack("<q", bytes(data[position : position + 8].tolist()))
            size = count * found[key].itemsize
            if count < 0 or position + 8 + size > len(data):
                raise pickle.UnpicklingError(f"storage {key} ends beyond the file")
            own = _legacy_bytes(file, data, position + 8, size, found[key]) if key in needed else None
            storages[key] = _Storage(key, own, found[key])
            position += 8 + size
        file.seek(begin)
        return _Unpickler(file, path, lambda pid: _view(storages[str(pid[2])], pid)).load()


def _storage_keys(content: Any) -> Iterator[str]:
    """Yield the keys of the storages of all meta tensors within nested containers."""
    if isinstance(content, Tensor):
        yield content._storage_key  # type: ignore[attr-defined]
    elif isinstance(content, Mapping):
        yield from _storage_keys(list(content.values()))
    elif isinstance(content, (list, tuple, set, frozenset)):
        for value in content:
            yield from _storage_keys(value)
    elif isinstance(content, (Values, Stub)):
        yield from _storage_keys(list(vars(content).values()))


def _legacy_bytes(file: BinaryIO, data: Tensor, start: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return a storage's bytes: mapped if they are aligned (by chance), else read: a copy would be in memory twice."""
    part = data[start : start + size]
    if _is_aligned(part, dtype):
        return part
    own = torch.empty(size, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(own.numpy().data) != size:  # type: ignore[attr-defined]
        raise pickle.UnpicklingError("it ends within a storage")
    return own


def _view(storage: _Storage, pid: tuple[Any, ...]) -> _Storage:
    """Return the part of a storage that a legacy persistent id asks for: (key, offset, length) as its sixth entry."""
    if len(pid) < 6 or pid[5] is None or storage.data is None:
        return storage
    _, offset, length = pid[5]
    size = storage.dtype.itemsize
    return _Storage(storage.key, storage.data[offset * size : (offset + length) * size], storage.dtype)


def _dtype(found: Any) -> torch.dtype:
    if not isinstance(found, torch.dtype):
        raise pickle.UnpicklingError(f"a storage of type {found!r}")
    return found


def _aligned(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes at an address that their type can be read from; torch.save has aligned them in a zip file."""
    return part if _is_aligned(part, dtype) else part.clone()


def _is_aligned(part: Tensor, dtype: torch.dtype) -> bool:
    return part.data_ptr() % dtype.itemsize == 0 and part.storage_offset() % dtype.itemsize == 0


def _unreadable(path: Path, problem: str) -> CheckpointError:
    problem = f"{path} is truncated, or not a file that torch.save wrote: {problem.rstrip('.')}"
    return CheckpointError(problem, fix="Copy or download the file again")
