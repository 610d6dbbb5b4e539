"""Context parallelism: split of the sequence over cp, and exchange of keys and values between its ranks.

The sequence is cut into 2 N equal chunks, and rank i of N holds chunks i and 2 N - 1 - i, so that all ranks have
equally many pairs of a query and a key before it (Llama 3, arXiv:2407.21783, section 3.3.2). Of another rank's keys,

- those of a lower rank: all queries of this rank attend to its first chunk, none to its second;
- those of a higher rank: the second half of the queries attends to both chunks, the first half to none.

Letters: s whole sequence, l = s/N the part of a rank, t keys of a block, b micro-batch, g key/value heads, d channels
of a head, N size of the context-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lite.backend.group import Group, Work
from megatron_lite.config.parallel import ContextExchange


def local_chunks(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return this rank's two chunks of a tensor with the whole sequence along `dim`, one after the other."""
    if group.size == 1:
        return x
    chunks = x.chunk(2 * group.size, dim)
    return torch.cat((chunks[group.rank], chunks[-1 - group.rank]), dim)


def chunk_positions(rank: int, length: int, size: int, device: torch.device) -> Tensor:
    """Return the positions [l] that rank `rank` of `size` holds of a sequence of `length` tokens, int64."""
    chunk = length // (2 * size)
    places = torch.arange(chunk, device=device)
    return torch.cat((places + rank * chunk, places + (2 * size - 1 - rank) * chunk))


@dataclass(frozen=True, eq=False)
class Block:
    """Keys and values of some ranks, and the queries of this rank that attend to them.

    Attributes:
        kv: keys and values, [2, t, b, g, d].
        rows: these queries, among the l of this rank.
        sources: ranks of the keys, in order.
        chunks: chunks of each of them: 2, or 1, the first.
        causal: the keys are at the positions of the queries; False: they are all before them.
    """

    kv: Tensor
    rows: slice
    sources: range
    chunks: int = 2
    causal: bool = False


class KeyExchange(Protocol):
    """Exchange of keys and values over a context-parallel group."""

    def blocks(self, kv: Tensor) -> Iterator[Block]:
        """Yield this rank's own keys and values, [2, l, b, g, d], then those of the others; a collective call."""

    def sum_gradients(self, kv: Tensor, parts: Iterable[tuple[Block, Tensor]]) -> Tensor:
        """Return the gradient of `kv` from the gradients [2, t, b, g, d] of the blocks of all ranks.

        A collective call. `parts` are in the order of `blocks`, and may be computed one by one.
        """


@dataclass(frozen=True, eq=False)
class GatheredKeys:
    """All-gather of keys and values, reduce-scatter of their gradients; each overlaps with a rank's own block."""

    group: Group

    def blocks(self, kv: Tensor) -> Iterator[Block]:
        """Yield own keys; the first chunks of lower ranks; both chunks of higher ranks."""
        rank, size, half = self.group.rank, self.group.size, kv.shape[1] // 2
        gathered = kv.new_empty((size, *kv.shape))
        work = self.group.all_gather_(gathered.flatten(0, 1), kv, async_op=True)
        yield _own(kv, rank)
        _wait(work)
        for sources, chunks in ((range(rank), 1), (range(rank + 1, size), 2)):
            if sources:
                part = gathered[sources.start : sources.stop, :, : chunks * half]
                yield _other(part.transpose(0, 1).flatten(1, 2), rank, sources, half)

    def sum_gradients(self, kv: Tensor, parts: Iterable[tuple[Block, Tensor]]) -> Tensor:
        """Reduce-scatter the gradients."""
        half = kv.shape[1] // 2
        gradients = kv.new_zeros((self.group.size, *kv.shape))
        for block, part in parts:
            target = gradients[block.sources.start : block.sources.stop, :, : block.chunks * half]
            target.copy_(part.unflatten(1, (len(block.sources), -1)).transpose(0, 1))
        total = torch.empty_like(kv)
        self.group.reduce_scatter_(total, gradients.flatten(0, 1))
        return total


@dataclass(frozen=True, eq=False)
class RingKeys:
    """Keys and values passed round a ring, each step overlapping with the attention to those of the step before.

    At most two ranks' keys and values are in memory (Liu et al. 2023, Ring Attention, arXiv:2310.01889). Backward
    passes them round again, and sends each gradient to the rank of its keys, which sums them in fp32.
    """

    group: Group

    def blocks(self, kv: Tensor) -> Iterator[Block]:
        """Yield own keys, then those of the rank before, of the one before that, and so on."""
        rank, size, half = self.group.rank, self.group.size, kv.shape[1] // 2
        for step in range(size):
            works: Sequence[Work] = ()
            arriving = kv
            if step + 1 < size:
                arriving = torch.empty_like(kv)
                works = self.group.exchange([(kv, (rank + 1) % size)], [(arriving, (rank - 1) % size)])
            source = (rank - step) % size
            if source == rank:
                yield _own(kv, rank)
            else:
                sources = range(source, source + 1)
                yield _other(kv[:, :half] if source < rank else kv, rank, sources, half)
            for work in works:
                work.wait()
            kv = arriving

    def sum_gradients(self, kv: Tensor, parts: Iterable[tuple[Block, Tensor]]) -> Tensor:
        """Send each rank the gradient of its keys, step by step; sum in fp32."""
        rank, size, half = self.group.rank, self.group.size, kv.shape[1] // 2
        total = torch.zeros_like(kv, dtype=torch.promote_types(kv.dtype, torch.float32))
        works: Sequence[Work] = ()
        received: Tensor | None = None

        def add_received() -> None:
            for work in works:
                work.wait()
            if received is not None:
                total[:, : received.shape[1]] += received

        for step, (block, part) in enumerate(parts):
            if step == 0:
                total += part
                continue
            add_received()
            sender = (rank + step) % size
            received = kv.new_empty((2, half if sender > rank else 2 * half, *kv.shape[2:]))
            sent = part.to(kv.dtype).contiguous()
            works = self.group.exchange([(sent, block.sources.start)], [(received, sender)])
        add_received()
        return total.to(kv.dtype)


def key_exchange(kind: ContextExchange, group: Group) -> KeyExchange:
    """Return the exchange that --cp-comm-type selects."""
    return GatheredKeys(group) if kind == "all_gather" else RingKeys(group)


def _own(kv: Tensor, rank: int) -> Block:
    return Block(kv, slice(None), range(rank, rank + 1), causal=True)


def _other(kv: Tensor, rank: int, sources: range, half: int) -> Block:
    """Return the block of other ranks, which are all lower or all higher than this one."""
    lower = sources.start < rank
    return Block(kv, slice(None) if lower else slice(half, None), sources, 1 if lower else 2)


def _wait(work: Work | None) -> None:
    if work is not None:
        work.wait()
