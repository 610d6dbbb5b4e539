"""Tensor-parallel shard merging: all ranks' shards as global tensors; checks that replicated tensors are equal.

A part is a tensor that is memory-mapped from a file, or one that is put together on demand (from a flattened ZeRO
buffer). One tensor at a time is held in memory, and only if its rows are in another order than ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.checkpoint.sources import TensorInfo, TensorSource
from megatron_lite.errors import CheckpointError
from megatron_lite.formatting import format_shape
from megatron_lite.interop.megatron.arrangements import Arrangement
from megatron_lite.interop.transforms import Shape
from megatron_lite.parallel.tensors import narrow
from megatron_lite.rectangle import Rectangle

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Part:
    """One rank's part of a tensor.

    Attributes:
        where: the file, for messages.
        shape: its shape.
        dtype: its dtype.
        load: returns it.
        is_mapped: whether load costs nothing.
    """

    where: str
    shape: Shape
    dtype: torch.dtype
    load: Callable[[], Tensor]
    is_mapped: bool = True


def mapped(tensor: Tensor, where: str) -> Part:
    """Return a part that is a tensor of a file."""
    return Part(where, tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True, eq=False)
class Joined:
    """A global tensor as tensor-parallel ranks hold it.

    Attributes:
        parts: one for each rank, in their order; of a replicated tensor, equal ones.
        dim: the dim of our global tensor that is split; None: it is replicated.
        arrangement: order of a part's rows; None: ours.
        average: whether a replicated tensor is the mean of its copies; otherwise it is rank 0's.
    """

    parts: Sequence[Part]
    dim: int | None
    arrangement: Arrangement | None = None
    average: bool = False

    @property
    def part_shape(self) -> Shape:
        """Shape of a part in our arrangement."""
        shape = self.parts[0].shape
        return shape if self.arrangement is None else self.arrangement.ours_shape(shape)

    @property
    def shape(self) -> Shape:
        """Shape of the global tensor."""
        shape = self.part_shape
        if self.dim is None or len(shape) <= self.dim:
            return shape
        return (*shape[: self.dim], shape[self.dim] * len(self.parts), *shape[self.dim + 1 :])


class JoinedTensors:
    """Global tensors as a TensorSource.

    Args:
        tensors: by name.

    Raises:
        CheckpointError: the parts of a tensor have different shapes or dtypes.
    """

    def __init__(self, tensors: Mapping[str, Joined]) -> None:
        self._joined = dict(tensors)
        self._held: tuple[str, dict[int, Tensor]] = ("", {})
        for name, joined in tensors.items():
            _check_parts(name, joined)
        self._tensors = {
            name: TensorInfo(joined.shape, str(joined.parts[0].dtype).removeprefix("torch."))
            for name, joined in tensors.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every global tensor."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle: a view of the file where it lies in one part."""
        joined = self._joined[name]
        if joined.dim is None:
            return narrow(self._replicated(name), rectangle)
        dim, length = joined.dim, joined.part_shape[joined.dim]
        found: list[Tensor] = []
        offset, shape = rectangle.offset, rectangle.shape
        begin, end = offset[dim], offset[dim] + shape[dim]
        for number in range(len(joined.parts)):
            first, last = max(begin, number * length), min(end, (number + 1) * length)
            if first < last or (begin == end and not found):
                inside = (*offset[:dim], first - number * length, *offset[dim + 1 :])
                size = (*shape[:dim], max(0, last - first), *shape[dim + 1 :])
                found.append(narrow(self._part(name, number), Rectangle(inside, size)))
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    def _replicated(self, name: str) -> Tensor:
        joined = self._joined[name]
        if not joined.average:
            return self._part(name, 0)
        total = torch.zeros(joined.part_shape, dtype=torch.float64)
        for number in range(len(joined.parts)):
            total += self._part(name, number)
        return (total / len(joined.parts)).to(joined.parts[0].dtype)

    def _part(self, name: str, number: int) -> Tensor:
        """Return a part in our arrangement; of what has to be made for it, one tensor's is kept."""
        joined = self._joined[name]
        part = joined.parts[number]
        if part.is_mapped and joined.arrangement is None:
            return part.load()
        if self._held[0] != name:
            self._held = (name, {})
        held = self._held[1]
        if number not in held:
            loaded = part.load()
            held[number] = loaded if joined.arrangement is None else joined.arrangement.to_ours(loaded)
        return held[number]


class Combined:
    """Several sources with different names as one."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._of = {name: source for source in sources for name in source.tensors}
        self._tensors = {name: source.tensors[name] for name, source in self._of.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of all sources."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle."""
        return self._of[name].read(name, rectangle)


class Renamed:
    """A source whose names have a prefix."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        self._tensors = {prefix + name: info for name, info in source.tensors.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its new name."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle."""
        return self._source.read(name.removeprefix(self._prefix), rectangle)


class RawTensors:
    """Tensors of all files under their own names, for `checkpoint inspect`."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._tensors = {
            name: TensorInfo(part.shape, str(part.dtype).removeprefix("torch.")) for name, part in parts.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of every file."""
        return self._tensors

    def read(self, name: str, rectangle: Rectangle) -> Tensor:
        """Return a rectangle."""
        return narrow(self._parts[name].load(), rectangle)


def differing_copies(tensors: Mapping[str, Joined]) -> dict[str, float]:
    """Return the replicated tensors whose copies differ between ranks, and the largest difference of each."""
    found = {}
    for name, joined in tensors.items():
        if joined.dim is not None or len(joined.parts) == 1:
            continue
        first = joined.parts[0].load()
        others = [part.load() for part in joined.parts[1:]]
        if not all(other.equal(first) for other in others):
            found[name] = max(float((other.double() - first.double()).abs().max()) for other in others)
    return found


def describe_copies(differing: Mapping[str, float]) -> str:
    """Return the differing copies as one line: how many, and the worst ones."""
    worst = sorted(differing, key=lambda name: -differing[name])[:_SHOWN]
    names = ", ".join(f"{name} by {differing[name]:.3g}" for name in worst)
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return names + more


def _check_parts(name: str, joined: Joined) -> None:
    first = joined.parts[0]
    for part in joined.parts[1:]:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"The files are of different checkpoints: the part of the tensor {name} is {format_shape(first.shape)} "
                f"({str(first.dtype).removeprefix('torch.')}) in {first.where}, and {format_shape(part.shape)} "
                f"({str(part.dtype).removeprefix('torch.')}) in {part.where}",
                fix="Copy the folder again from one checkpoint",
            )
