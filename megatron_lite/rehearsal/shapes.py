"""Meta-tensor dispatch mode: caches output shapes and counts the memory of tensors.

Torch computes the shapes of many operations in Python, which takes milliseconds. A rehearsal asks for the same ones
thousands of times.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Seen = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]


class ShapesOnly(TorchDispatchMode):
    """While entered, does every operation on meta tensors, and keeps count of the storage that is alive.

    Attributes:
        live: bytes of the storages made inside that are still referred to.
        peak: the most that `live` was since the last reset_peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[Any, _Seen] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Forgets the peak: it is now what is alive now."""
        self.peak = self.live

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would wrap every operation in a guard against compilation, which takes as long as the operation.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = _key(function, args, kwargs) if _makes_new_tensors(function) else None
        if key is not None and (seen := self._seen.get(key)) is not None:
            made = [None if one is None else _like(one) for one in seen]
            result: Any = made[0] if len(made) == 1 else tuple(made)
        else:
            result = function(*args, **(kwargs or {}))
            made = list(result) if isinstance(result, (tuple, list)) else [result]
            if key is not None and all(one is None or (isinstance(one, Tensor) and one.is_meta) for one in made):
                self._seen[key] = tuple(None if one is None else (one.shape, one.stride(), one.dtype) for one in made)
        for one in made:
            if isinstance(one, Tensor) and one.is_meta:
                self._count(one)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[identity]
            self.live -= size

        self._known[identity] = weakref.ref(storage, gone)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live


def _makes_new_tensors(function: Any) -> bool:
    """Whether the operation changes no argument and returns none, nor a view of one."""
    known: bool | None = getattr(function, "_makes_new_tensors", None)
    if known is None:
        schema = function._schema
        known = not schema.is_mutable and not any(entry.alias_info for entry in (*schema.arguments, *schema.returns))
        # This one says that it makes a new tensor, and returns a view.
        known = known and function.namespace == "aten" and function.overloadpacket.__name__ != "_unsafe_view"
        function._makes_new_tensors = known
    return known


def _key(function: Any, args: Any, kwargs: Any) -> Any:
    """What decides the shapes of the results; None if an argument is not one that can be compared."""
    parts: list[Any] = [function]
    for value in (*args, *(kwargs.items() if kwargs else ())):
        part = _part(value)
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def _part(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, (list, tuple)):
        parts = tuple(_part(one) for one in value)
        return None if None in parts else (type(value), *parts)
    return (type(value), value)


def _like(seen: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
    shape, stride, dtype = seen
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
