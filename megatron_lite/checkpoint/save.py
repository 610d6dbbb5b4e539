"""Synchronous distributed saving, and the assignment of replicated tensors to ranks (save deduplication)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.writing import CheckpointWriter, SaveReport, SaveRequest
from megatron_lite.parallel.tensors import GlobalTensor, Piece, narrow
from megatron_lite.rectangle import rectangles_of_range


def save_checkpoint(request: SaveRequest, tensors: Sequence[GlobalTensor], world: Group) -> SaveReport:
    """Write a checkpoint and make it the latest; a collective call that returns once it is durable.

    Args:
        request: destination, which all ranks must share, and content besides tensors.
        tensors: state on this rank; over all ranks, each element must have exactly one writer, or replicas that share
            the work.
        world: all ranks.

    Raises:
        CheckpointError: it could not be written, on every rank. Earlier checkpoints are untouched and nothing of this
            one is left.
    """
    tensors = deduplicate(tensors)

    def write() -> None:
        writer.add_tensors(tensors)
        writer.close()

    with CheckpointWriter(request, world, size_to_write(tensors)) as writer:
        run_on_all_ranks(world, write)
        return broadcast_from_rank0(world, writer.finish)


def size_to_write(tensors: Sequence[GlobalTensor]) -> int:
    """Return the bytes of the pieces that this rank saves."""
    return sum(piece.tensor.nbytes for tensor in tensors if tensor.write for piece in tensor.pieces)


def deduplicate(tensors: Sequence[GlobalTensor]) -> list[GlobalTensor]:
    """Return the same tensors, each with the part of its pieces that this rank saves.

    Data-parallel replicas hold the same weights and, without ZeRO, the same optimizer state. Laid end to end, these are
    one range of bytes, of which each replica writes an equal part: as under ZeRO-1, a part cuts few tensors, each into
    rectangles.

    Args:
        tensors: state on this rank. Replicas must hold their common tensors in the same order and with the same shapes.
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
    """Return the range of bytes that a replica saves of all that `count` replicas hold."""
    total = sum(
        piece.tensor.numel() * piece.tensor.element_size()
        for tensor in tensors
        if _takes_part(tensor) and tensor.replica == (replica, count)
        for piece in tensor.pieces
    )
    return total * replica // count, total * (replica + 1) // count


def _within(piece: Piece, start: int, stop: int) -> Iterator[Piece]:
    """Yield the part of a piece between two bytes, cut between rows: a row belongs to the part in which it begins."""
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
