"""Save deduplication: assigns replicated tensors to ranks, each element written once, load balanced.

Data-parallel replicas hold the same weights and, without ZeRO, the same optimizer state. Laid end to end, these are one
range of bytes, of which each replica writes its part: as under ZeRO-1, a part cuts few tensors, each into rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.rectangle import rectangles_of_range


def share_out(tensors: Sequence[GlobalTensor]) -> list[GlobalTensor]:
    """What this rank is to write: the same tensors, each with the pieces that are this rank's part.

    Args:
        tensors: what the rank holds. Those with the same number of replicas must be held in the same order, and with
            the same shapes, by all of these.
    """
    bounds = {count: _part(tensors, replica, count) for replica, count in {tensor.replica for tensor in tensors}}
    done = dict.fromkeys(bounds, 0)
    shared = []
    for tensor in tensors:
        if not _takes_part(tensor):
            shared.append(replace(tensor, pieces=[]))
            continue
        count = tensor.replica[1]
        start, stop = bounds[count]
        sizes = [piece.tensor.numel() * piece.tensor.element_size() for piece in tensor.pieces]
        begins = accumulate(sizes, initial=done[count])
        pieces = [
            part
            for piece, begin in zip(tensor.pieces, begins, strict=False)
            for part in _within(piece, start - begin, stop - begin)
        ]
        done[count] += sum(sizes)
        shared.append(replace(tensor, pieces=pieces, write=True))
    return shared


def _takes_part(tensor: GlobalTensor) -> bool:
    return tensor.write or tensor.replica[1] > 1


def _part(tensors: Sequence[GlobalTensor], replica: int, count: int) -> tuple[int, int]:
    """First and last byte of a replica's part of all that `count` replicas hold."""
    total = sum(
        piece.tensor.numel() * piece.tensor.element_size()
        for tensor in tensors
        if _takes_part(tensor) and tensor.replica == (replica, count)
        for piece in tensor.pieces
    )
    return total * replica // count, total * (replica + 1) // count


def _within(piece: Piece, start: int, stop: int) -> Iterator[Piece]:
    """The part of a piece between two bytes, cut between rows: a row belongs to the part in which it begins."""
    shape = piece.tensor.shape
    row = (shape[-1] if len(shape) > 1 else 1) * piece.tensor.element_size()
    size = piece.tensor.numel() * piece.tensor.element_size()
    if (start <= 0 and stop >= size) or not size:
        yield piece
        return
    first, last = (min(size, max(0, -(-bound // row) * row)) for bound in (start, stop))
    item = piece.tensor.element_size()
    for block in rectangles_of_range(shape, first // item, last // item):
        yield Piece(block.shifted(piece.offset).offset, narrow(piece.tensor, block))
