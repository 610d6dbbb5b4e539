"""Where each parameter lies in its flat buffer, and which ranges of the buffer are reduced together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_lite.parallel.parameters import NamedParameter

ALIGNMENT = 64
"""Elements: a parameter begins at a multiple of 256 bytes in fp32, as kernels and matrix products like it."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter's place in its buffer: elements [start, stop)."""

    parameter: NamedParameter
    start: int

    @property
    def stop(self) -> int:
        """One after the parameter's last element."""
        return self.start + self.parameter.param.numel()


@dataclass(frozen=True, eq=False)
class Bucket:
    """A range of a buffer whose gradients are reduced in one collective: whole parameters, and padding."""

    slots: tuple[Slot, ...]
    start: int
    stop: int

    def slice_of(self, coordinate: int, parts: int) -> range:
        """The elements of the buffer that replica `coordinate` of `parts` steps under ZeRO-1."""
        length = (self.stop - self.start) // parts
        return range(self.start + coordinate * length, self.start + (coordinate + 1) * length)


def lay_out(
    parameters: Sequence[NamedParameter],
    *,
    bucket_elements: int,
    parts: int,
    alone: Callable[[NamedParameter], bool],
) -> list[Bucket]:
    """Cuts one buffer into buckets.

    The order is reversed, because backward reaches the last layers first: so the first bucket is complete while most
    of backward is still to come.

    Args:
        parameters: of one buffer, in the order of the forward pass.
        bucket_elements: a bucket is closed once it holds as many.
        parts: every bucket's length is made a multiple of this (times the alignment), so that it splits evenly.
        alone: parameters that get a bucket to themselves. A tied weight needs it: its copies lie in buffers that are
            laid out differently, and only so does each replica hold the same slice of every copy.

    Returns:
        Buckets that follow each other without gaps.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    begin = end = 0

    def close() -> None:
        nonlocal slots, begin, end
        if slots:
            stop = begin + _round_up(end - begin, parts * ALIGNMENT)
            buckets.append(Bucket(tuple(slots), begin, stop))
            slots, begin, end = [], stop, stop

    for parameter in reversed(parameters):
        if alone(parameter):
            close()
        slots.append(Slot(parameter, end))
        end += _round_up(parameter.param.numel(), ALIGNMENT)
        if alone(parameter) or end - begin >= bucket_elements:
            close()
    close()
    return buckets


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
