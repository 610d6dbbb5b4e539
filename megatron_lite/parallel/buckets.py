"""Bucket communication: overlapped gradient reduction and parameter all-gather of a flat buffer's buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_lite.backend.group import Group, Work
from megatron_lite.config.buckets import partition
from megatron_lite.parallel.parameters import NamedParameter


@dataclass(frozen=True, eq=False)
class Slot:
    """Place of a parameter in its buffer: elements [start, stop)."""

    parameter: NamedParameter
    start: int

    @property
    def stop(self) -> int:
        """Return the end of the parameter, without padding."""
        return self.start + self.parameter.param.numel()


@dataclass(frozen=True, eq=False)
class Bucket:
    """Range of a buffer whose gradients are reduced in one collective: complete parameters, and padding."""

    slots: tuple[Slot, ...]
    start: int
    stop: int

    def slice_of(self, coordinate: int, parts: int) -> range:
        """Return the elements of the buffer that replica `coordinate` of `parts` updates under ZeRO-1."""
        length = (self.stop - self.start) // parts
        return range(self.start + coordinate * length, self.start + (coordinate + 1) * length)


def lay_out(
    parameters: Sequence[NamedParameter], *, bucket_elements: int, parts: int, apart: Mapping[str, str] | None = None
) -> list[Bucket]:
    """Lay out one buffer, in buckets that follow each other without gaps (config/buckets.py).

    Args:
        parameters: of one buffer, in the order of the forward pass.
        bucket_elements: size at which a bucket is closed.
        parts: every bucket's length is a multiple of this times the alignment, so that it splits evenly.
        apart: modules whose parameters have buckets of their own, by name of the parameter. A module shared by several
            stages needs them: its copies are in buffers of different layout, and every replica must hold the same slice
            of each copy. The parameters of a module follow each other.
    """
    modules = [(apart or {}).get(parameter.name, "") for parameter in parameters]
    sizes = [parameter.param.numel() for parameter in parameters]
    ranges = partition(sizes, bucket_elements=bucket_elements, parts=parts, modules=modules)
    return [
        Bucket(tuple(Slot(parameters[number], start) for number, start in placements), begin, stop)
        for placements, begin, stop in ranges
    ]


class GradientReduction:
    """Reduction of gradients over the data-parallel replicas, bucket by bucket, overlapped with backward.

    Every replica must start the same collectives in the same order, whatever number of backward passes it runs. The
    order is therefore fixed: that in which a backward pass completes the buckets. A replica that runs no backward
    starts all of them at once.

    Args:
        buckets: with the flat fp32 gradients that they are ranges of, in the order in which backward completes them.
        dp: the ranks that hold the same parameters: over dp and cp.
        scatter: reduce-scatter, in place: each replica gets the sums of its slice only (ZeRO-1).
        overlap: start buckets before finish().
    """

    def __init__(
        self,
        buckets: Sequence[tuple[Bucket, Tensor]],
        *,
        dp: Group,
        scatter: bool,
        overlap: bool,
    ) -> None:
        self.overlap = overlap
        self._dp, self._scatter = dp, scatter
        self._buckets = tuple(buckets)
        self._bucket_of = {
            id(param): number
            for number, (bucket, _) in enumerate(self._buckets)
            for slot in bucket.slots
            for param in slot.parameter.uses
        }
        self._per_backward = [sum(slot.parameter.passes for slot in bucket.slots) for bucket, _ in self._buckets]
        self._missing: list[int] | None = None
        self._works: list[Work | None] = []

    def begin(self, backwards: int) -> None:
        """Expect the gradients of `backwards` micro-batches; buckets without any are started."""
        assert not self._works, "the reduction of the last iteration was never finished"
        if self.overlap:
            self._missing = [backwards * count for count in self._per_backward]
            self._start_complete()

    def arrived(self, param: Tensor) -> None:
        """Count one gradient of a parameter, and start the buckets that are complete."""
        if self._missing is None:
            return
        number = self._bucket_of[id(param)]
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "more backward passes than announced: this gradient is already being reduced"
        if self._missing[number] == 0:
            self._start_complete()

    def finish(self) -> None:
        """Start the remaining buckets, and wait for all."""
        if self._dp.size > 1:
            while len(self._works) < len(self._buckets):
                self._start_next()
            _wait_all(self._works)
        self._works, self._missing = [], None

    def _start_complete(self) -> None:
        assert self._missing is not None
        while len(self._works) < len(self._buckets) and self._missing[len(self._works)] == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket, flat = self._buckets[len(self._works)]
        gradients = flat[bucket.start : bucket.stop]
        if self._scatter:
            own = bucket.slice_of(self._dp.rank, self._dp.size)
            work = self._dp.reduce_scatter_(flat[own.start : own.stop], gradients, async_op=True)
        else:
            work = self._dp.all_reduce_(gradients, async_op=True)
        self._works.append(work)


class ParameterGather:
    """ZeRO-1 all-gather of updated parameters, one collective per bucket, overlapped with the next forward.

    Args:
        buckets: with the flat parameters that they are ranges of, in the order in which backward completes them.
        dp: the ranks that hold the same parameters; each holds its slice of every bucket.
    """

    def __init__(self, buckets: Sequence[tuple[Bucket, Tensor]], dp: Group) -> None:
        self._buckets = list(reversed(buckets))  # the order in which forward reads them
        self._dp = dp
        self._overlapped: set[int] = set()
        self._works: dict[int, Work | None] = {}

    def overlap_with(self, units: Iterable[nn.Module]) -> None:
        """Let each unit's forward wait for the unit's own parameters; start() waits only for parameters of no unit."""
        bucket_of = {
            id(param): number
            for number, (bucket, _) in enumerate(self._buckets)
            for slot in bucket.slots
            for param in slot.parameter.uses
        }
        covered: set[int] = set()
        for unit in units:
            params = [id(param) for param in unit.parameters()]
            covered.update(params)
            unit.register_forward_pre_hook(
                self._wait_hook(sorted({bucket_of[param] for param in params if param in bucket_of}))
            )
        self._overlapped = {
            number
            for number, (bucket, _) in enumerate(self._buckets)
            if all(id(slot.parameter.param) in covered for slot in bucket.slots)
        }

    def start(self) -> None:
        """Start all gathers, and wait for those that no unit waits for."""
        self.finish()
        # Those that are waited for here go first: collectives that run in order would delay this until the last.
        for number in sorted(range(len(self._buckets)), key=lambda number: number in self._overlapped):
            bucket, flat = self._buckets[number]
            own = bucket.slice_of(self._dp.rank, self._dp.size)
            gathered = flat[bucket.start : bucket.stop]
            self._works[number] = self._dp.all_gather_(gathered, flat[own.start : own.stop], async_op=True)
        self._wait([number for number in self._works if number not in self._overlapped])

    def finish(self) -> None:
        """Wait for all gathers."""
        self._wait(list(self._works))

    def _wait(self, numbers: Sequence[int]) -> None:
        _wait_all([self._works.pop(number) for number in numbers if number in self._works])

    def _wait_hook(self, numbers: Sequence[int]) -> Callable[[nn.Module, Any], None]:
        def wait(module: nn.Module, args: Any) -> None:
            if self._works:
                self._wait(numbers)

        return wait


def _wait_all(works: Sequence[Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
