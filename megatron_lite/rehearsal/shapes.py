"""Meta-tensor dispatch mode: caches output shapes and counts the memory of tensors.

Torch computes output shapes of many operators in Python, which takes milliseconds, and a dry run calls the same
operators with the same shapes thousands of times.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Shapes = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...]


class MetaTensorMode(TorchDispatchMode):
    """Dispatch mode that runs operators on meta tensors from a cache of shapes, and counts live memory.

    Attributes:
        live: bytes of the storages created under the mode that are still referenced.
        peak: largest value of `live` since the last reset_peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._cache: dict[Any, _Shapes] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Set `peak` to the current value of `live`."""
        self.peak = self.live

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch wraps every operator in a guard against compilation, which takes as long as the operator.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = _key(function, args, kwargs) if _makes_new_tensors(function) else None
        if key is not None and (cached := self._cache.get(key)) is not None:
            made = [
                None if one is None else torch.empty_strided(one[0], one[1], dtype=one[2], device="meta")
                for one in cached
            ]
            result: Any = made[0] if len(made) == 1 else tuple(made)
        else:
            result = function(*args, **(kwargs or {}))
            made = list(result) if isinstance(result, (tuple, list)) else [result]
            if key is not None and all(one is None or (isinstance(one, Tensor) and one.is_meta) for one in made):
                self._cache[key] = tuple(None if one is None else (one.shape, one.stride(), one.dtype) for one in made)
        for one in made:
            if isinstance(one, Tensor) and one.is_meta:
                self._count(one)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._storages:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._storages[identity]
            self.live -= size

        self._storages[identity] = weakref.ref(storage, freed)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live


def _makes_new_tensors(function: Any) -> bool:
    """Return whether the operator only returns new tensors: it changes no argument and returns no view of one."""
    known: bool | None = getattr(function, "_makes_new_tensors", None)
    if known is None:
        schema = function._schema
        known = not schema.is_mutable and not any(entry.alias_info for entry in (*schema.arguments, *schema.returns))
        # Against its schema, _unsafe_view returns a view.
        known = known and function.namespace == "aten" and function.overloadpacket.__name__ != "_unsafe_view"
        function._makes_new_tensors = known
    return known


def _key(function: Any, args: Any, kwargs: Any) -> Any:
    """Return a key that determines the shapes of the results; None: an argument cannot be compared."""
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
