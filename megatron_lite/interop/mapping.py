"""Tensor mapping engine: renames and transforms tensors lazily by a mapping table, for import and export.

A table is a list of entries: a tensor of ours, the tensors of theirs that hold the same numbers, and the transform
between them. ImportedTensors shows a foreign source under our names, ExportedTensors a source of ours under theirs;
both are TensorSources again and convert what is read, one entry at a time, so that nothing is held twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.checkpoint.sources import TensorInfo, TensorSource
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_shape
from megatron_lite.interop.transforms import Rows, Same, Shape, Transform
from megatron_lite.parallel.tensors import narrow
from megatron_lite.rectangle import Rectangle

_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """One row of a table: a tensor of ours, and the tensors of theirs that it is converted to and from."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = Same()  # noqa: RUF009, a frozen value

    @property
    def is_aligned(self) -> bool:
        """True if both tensors have the same elements at the same indices, so that rectangles need no conversion."""
        return isinstance(self.transform, (Same, Rows))


class ImportedTensors:
    """Tensors of a foreign source under our names.

    Args:
        source: their tensors.
        entries: the table.
        shapes: our tensors, all of which must be filled.
        where: the folder, for messages.
        ignored: names of theirs that need no place here (patterns of whole names).
        dtype: what they are converted to; None: each keeps its own.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, or not of a floating-point dtype.
    """

    def __init__(
        self,
        source: TensorSource,
        entries: Sequence[Entry],
        shapes: Mapping[str, Shape],
        where: Path,
        ignored: Sequence[re.Pattern[str]] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source = source
        self._where = where
        self._entries = {entry.ours: entry for entry in entries}
        self._joined: tuple[str, Tensor] | None = None
        assert self._entries.keys() == shapes.keys(), self._entries.keys() ^ shapes.keys()
        self._check_names(ignored)
        self._tensors = {}
        for entry in entries:
            expected = entry.transform.shapes(shapes[entry.ours])
            for name, shape in zip(entry.theirs, expected, strict=True):
                _check_tensor(name, source.tensors[name], shape, where)
            own = getattr(torch, source.tensors[entry.theirs[0]].dtype)
            self._tensors[entry.ours] = TensorInfo(shapes[entry.ours], _name_of(dtype or own))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor under our name."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle, converted.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        entry, dtype = self._entries[name], getattr(torch, self._tensors[name].dtype)
        if entry.is_aligned:
            (theirs,) = entry.theirs
            return _finite(self._source.read(theirs, rectangle), theirs, self._where).to(dtype)
        if self._joined is None or self._joined[0] != name:
            self._joined = None  # before the next is read: one at a time
            parts = [_finite(_whole(self._source, theirs), theirs, self._where) for theirs in entry.theirs]
            self._joined = (name, entry.transform.join(parts).to(dtype))
        return narrow(self._joined[1], rectangle)

    def _check_names(self, ignored: Sequence[re.Pattern[str]]) -> None:
        needed = {theirs: entry.ours for entry in self._entries.values() for theirs in entry.theirs}
        there = self._source.tensors.keys()
        left = sorted(name for name in there - needed.keys() if not any(pattern.fullmatch(name) for pattern in ignored))
        missing = sorted(needed.keys() - there)
        if missing:
            near = difflib.get_close_matches(missing[0], left, n=1)
            raise CheckpointError(
                f"{self._where} does not contain {_listed(missing)}, which the model needs"
                + (f"; the nearest name is {near[0]}" if near else ""),
                fix="Download or copy the folder again: its config and its weights may be of different models",
            )
        if left:
            raise CheckpointError(
                f"{self._where} contains tensors that the model does not have: {_listed(left)}",
                fix="Import a plain language model; adapters, other heads and quantized weights are not supported",
            )


class ExportedTensors:
    """Tensors of a source of ours under their names, all in one dtype.

    Args:
        source: our tensors.
        entries: the table; every entry's tensor must be in the source.
        dtype: what they are converted to.
        where: the checkpoint, for messages.
    """

    def __init__(self, source: TensorSource, entries: Sequence[Entry], dtype: torch.dtype, where: Path) -> None:
        self._source = source
        self._where = where
        self._dtype = dtype
        self._entries = {theirs: (entry, number) for entry in entries for number, theirs in enumerate(entry.theirs)}
        self._split: tuple[str, tuple[Tensor, ...]] | None = None
        self._tensors = {}
        for entry in entries:
            shapes = entry.transform.shapes(source.tensors[entry.ours].shape)
            for name, shape in zip(entry.theirs, shapes, strict=True):
                self._tensors[name] = TensorInfo(shape, _name_of(dtype))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor under their name, in the table's order."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle, converted.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        entry, number = self._entries[name]
        if isinstance(entry.transform, Same):
            return _finite(self._source.read(entry.ours, rectangle), entry.ours, self._where).to(self._dtype)
        if self._split is None or self._split[0] != entry.ours:
            self._split = None
            ours = _finite(_whole(self._source, entry.ours), entry.ours, self._where)
            self._split = (entry.ours, tuple(part.to(self._dtype) for part in entry.transform.split(ours)))
        return narrow(self._split[1][number], rectangle)


def _whole(source: TensorSource, name: str) -> Tensor:
    return source.read(name, source.tensors[name].full)


def _finite(tensor: Tensor, name: str, where: Path) -> Tensor:
    # aminmax keeps NaN and takes no memory.
    if not tensor.numel() or all(bound.isfinite() for bound in tensor.aminmax()):
        return tensor
    raise CheckpointError(
        f"The tensor {name} in {where} contains {int(tensor.isfinite().logical_not().sum()):,} NaN or infinite values",
        fix="Use an earlier checkpoint, or copy or download the files again",
    )


def _check_tensor(name: str, info: TensorInfo, shape: Shape, where: Path) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"The tensor {name} in {where} has the shape {format_shape(info.shape)}, but the config requires "
            f"{format_shape(shape)}",
            fix="Download or copy the folder again: its config and its weights may be of different models",
        )
    if info.dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise CheckpointError(
            f"The tensor {name} in {where} has the dtype {info.dtype}, which is not a floating-point type",
            fix="Use an unquantized version of the model",
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
