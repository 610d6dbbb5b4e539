"""Gradient buckets: partition of a rank's flat parameter buffer into ranges that are reduced in one collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64
"""Elements: each parameter starts at a multiple of 256 bytes in fp32, where kernels and matrix products are fastest."""


class Placement(NamedTuple):
    """Number of a parameter, and the element of the buffer at which it starts."""

    number: int
    start: int


class BucketRange(NamedTuple):
    """Elements [start, stop) of a buffer: complete parameters, and padding."""

    placements: tuple[Placement, ...]
    start: int
    stop: int


def partition(
    sizes: Sequence[int], *, bucket_elements: int, parts: int, modules: Sequence[str] | None = None
) -> list[BucketRange]:
    """Lay out one buffer, in buckets that follow each other without gaps.

    The order of the parameters is reversed: backward reaches the last layers first, so that the first bucket is
    complete early and its reduction overlaps with the rest of backward.

    Args:
        sizes: elements of each parameter, in the order of the forward pass.
        bucket_elements: size at which a bucket is closed.
        parts: every bucket's length is a multiple of this times the alignment, so that it splits evenly.
        modules: of each parameter the module whose parameters have buckets of their own; empty: none. The parameters
            of a module follow each other.
    """
    buckets: list[BucketRange] = []
    placements: list[Placement] = []
    begin = end = 0
    module = ""
    for number in range(len(sizes) - 1, -1, -1):
        own = modules[number] if modules else ""
        if placements and (own != module or end - begin >= bucket_elements):
            stop = begin + round_up(end - begin, parts * ALIGNMENT)
            buckets.append(BucketRange(tuple(placements), begin, stop))
            placements, begin, end = [], stop, stop
        module = own
        placements.append(Placement(number, end))
        end += round_up(sizes[number], ALIGNMENT)
    if placements:
        buckets.append(BucketRange(tuple(placements), begin, begin + round_up(end - begin, parts * ALIGNMENT)))
    return buckets


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a number."""
    return -(-number // multiple) * multiple
