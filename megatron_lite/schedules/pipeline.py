"""Pipeline schedules (GPipe, 1F1B, interleaved, zero-bubble): the ordered actions of each rank.

Symbols: p ranks, v model chunks per rank, m micro-batches. Stages are numbered over the model, from 0 to p * v - 1.
`lowering.py` adds sends and receives; `simulate.py` computes times, bubble and memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Literal, NamedTuple

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.errors import ConfigError

ActionKind = Literal["F", "B", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
COMPUTE: frozenset[str] = frozenset({"F", "B", "W"})
SPLIT_BACKWARD: frozenset[str] = frozenset({"zb-h1", "zb-v"})
"""Schedules with deferred weight gradients: B computes the input gradient of a stage, W the weight gradients."""


class Action(NamedTuple):
    """One action of a rank: computes, sends or receives for one micro-batch of one of its stages.

    F, B and W compute. SEND_F sends the output of `stage` to the rank of the next stage, RECV_F receives the input of
    `stage` from the rank of the previous stage. SEND_B sends the gradient of the input of `stage` to the rank of the
    previous stage, RECV_B receives the gradient of the output of `stage` from the rank of the next stage. `peer` is the
    other pipeline rank.
    """

    kind: ActionKind
    stage: int
    microbatch: int
    peer: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Action]]
_Op = tuple[Literal["F", "B", "W"], int]
"""Kind and chunk; occurrence n belongs to micro-batch n."""


def num_chunks(kind: PipelineKind, chunks: int = 1) -> int:
    """Return the model chunks of each rank: 2 for zb-v, otherwise `chunks`."""
    return 2 if kind == "zb-v" else chunks


def num_stages(kind: PipelineKind, pp: int, chunks: int = 1) -> int:
    """Return the number of pipeline stages."""
    return pp * num_chunks(kind, chunks)


def stage_of_chunk(kind: PipelineKind, pp: int, rank: int, chunk: int) -> int:
    """Return the stage of chunk `chunk` on pipeline rank `rank`.

    Chunks are placed round-robin (ranks 0 … p-1, then 0 … p-1 again). Under zb-v they form a V: the second chunks run
    from rank p-1 back to 0, so rank 0 holds the first and the last stage, and rank p-1 two adjacent stages.
    """
    if kind == "zb-v" and chunk == 1:
        return 2 * pp - 1 - rank
    return chunk * pp + rank


def rank_of_stage(kind: PipelineKind, pp: int, stage: int) -> int:
    """Return the pipeline rank that holds `stage`."""
    if kind == "zb-v" and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def pipeline_schedule(kind: PipelineKind, pp: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """Return the compute actions of every pipeline rank, in order.

    Any number of micro-batches is valid, including 0 and fewer than ranks. A schedule whose pattern needs more is built
    for more, and the actions of micro-batches beyond `num_microbatches` are removed: micro-batches are independent of
    each other, so the remaining order is valid.

    Raises:
        ConfigError: the schedule does not support these sizes.
    """
    _check(kind, pp, num_microbatches, chunks)
    return [
        _actions(_ops(kind, pp, rank, num_microbatches, chunks), kind, pp, rank, num_microbatches) for rank in range(pp)
    ]


def _check(kind: PipelineKind, pp: int, num_microbatches: int, chunks: int) -> None:
    for flag, number, least in (("--pp", pp, 1), ("--chunks", chunks, 1), ("--microbatches", num_microbatches, 0)):
        if number < least:
            raise ConfigError(f"Cannot schedule with {flag} {number}", fix=f"Give {flag} a number of at least {least}")
    if chunks > 1 and kind != "interleaved" and num_chunks(kind) != chunks:
        raise ConfigError(
            f"The pipeline schedule {kind} does not support {chunks} model chunks on each rank (--chunks {chunks})",
            rule="The schedule interleaved supports any number, zb-v has 2, and the others have 1",
            fix="Use --kind interleaved, or remove --chunks",
        )


def _actions(ops: Iterable[_Op], kind: PipelineKind, pp: int, rank: int, num_microbatches: int) -> list[Action]:
    seen: Counter[_Op] = Counter()
    actions = []
    for op in ops:
        microbatch, seen[op] = seen[op], seen[op] + 1
        if microbatch < num_microbatches:
            actions.append(Action(op[0], stage_of_chunk(kind, pp, rank, op[1]), microbatch))
    return actions


def _ops(kind: PipelineKind, pp: int, rank: int, m: int, chunks: int) -> Iterator[_Op]:
    if kind == "gpipe":
        return chain(repeat(("F", 0), m), repeat(("B", 0), m))
    if kind == "1f1b":
        return _one_forward_one_backward(repeat(("F", 0), m), repeat(("B", 0), m), warmup=pp - 1 - rank)
    if kind == "interleaved":
        return _interleaved(pp, rank, m, chunks)
    if kind == "zb-h1":
        return _zb_h1(pp, rank, m)
    assert kind == "zb-v", kind
    return _zb_v(pp, rank, m)


def _one_forward_one_backward(forwards: Iterator[_Op], backwards: Iterator[_Op], warmup: int) -> Iterator[_Op]:
    """Yield `warmup` forwards, then alternate forwards and backwards, then the remaining backwards."""
    for _ in range(warmup):
        yield from _next(forwards)
    for backward in backwards:
        yield from _next(forwards)
        yield backward


def _interleaved(pp: int, rank: int, m: int, chunks: int) -> Iterator[_Op]:
    """Interleaved 1F1B (Narayanan et al. 2021, arXiv:2104.04473, §2.2): chunks alternate, one round at a time.

    In the paper a round has p micro-batches and p divides m. Here a round has at least p, as even as m allows, so that
    the bubble is (p-1) / (v*m + p-1) for every m >= p. For m < p the only round is an incomplete round of p.
    """
    rounds, m = max(1, m // pp), max(m, pp)
    sizes = [m // rounds + (number < m % rounds) for number in range(rounds)]
    order = [chunk for size in sizes for chunk in range(chunks) for _ in range(size)]
    backward_order = [chunks - 1 - chunk for chunk in order]
    warmup = 2 * (pp - 1 - rank) + (chunks - 1) * sizes[0] if chunks > 1 else pp - 1 - rank
    forwards: Iterator[_Op] = (("F", chunk) for chunk in order)
    backwards: Iterator[_Op] = (("B", chunk) for chunk in backward_order)
    return _one_forward_one_backward(forwards, backwards, warmup)


def _zb_h1(pp: int, rank: int, m: int) -> Iterator[_Op]:
    """ZB-H1 (Qi et al. 2023, arXiv:2401.10241): 1F1B with weight gradients deferred by r micro-batches on rank r.

    Every rank holds at most p activations, as rank 0 does under 1F1B, and the deferred weight gradients fill the bubble
    at the end.
    """
    forwards: Iterator[_Op] = repeat(("F", 0), m)
    for _ in range(pp - 1 - rank):
        yield from _next(forwards)
    for microbatch in range(m):
        yield from _next(forwards)
        yield "B", 0
        if microbatch >= rank:
            yield "W", 0
    yield from repeat(("W", 0), min(rank, m))


def _zb_v(pp: int, rank: int, m: int) -> Iterator[_Op]:
    """ZB-V (Qi et al. 2024, arXiv:2405.15362): two chunks per rank in a V, no bubble if F, B and W take equal times.

    The stages of chunk 0 descend the V, those of chunk 1 ascend it. A rank holds at most 2p half-size activations, the
    memory of 1F1B. The pattern needs at least 2p - 1 micro-batches.
    """
    m = max(m, 2 * pp - 1)
    down, up = 2 * (pp - rank) - 1, pp - rank
    yield from repeat(("F", 0), down)
    for _ in range(rank):
        yield from (("F", 1), ("F", 0))
    for _ in range(up):
        yield from (("F", 1), ("B", 1), ("W", 1))
    # 2p - 1 - rank forwards of chunk 0 are done, p of chunk 1, p - rank backwards of chunk 1.
    forwards_left = m - (down + rank)
    for turn in range(m - pp):
        if turn < forwards_left:
            yield "F", 0
        yield from (("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1))
    # The remaining backwards: p of chunk 0 and `rank` of chunk 1; their weight gradients are deferred to the end.
    for _ in range(rank):
        yield from (("B", 0), ("B", 1))
    for _ in range(up):
        yield from (("B", 0), ("W", 0))
    yield from repeat(("W", 1), rank)
    yield from repeat(("W", 0), rank)


def _next(ops: Iterator[_Op]) -> Iterator[_Op]:
    """Yield the next of `ops`, if any is left."""
    for op in ops:
        yield op
        return
