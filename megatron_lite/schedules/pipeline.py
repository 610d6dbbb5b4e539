"""Pipeline schedules (GPipe, 1F1B, interleaved, zero-bubble): the ordered actions of each rank.

Names: p ranks, v model chunks a rank, m micro-batches. Stages number the whole model's pieces from the first (0) to the
last (p * v - 1). `lowering.py` adds the sends and receives, `simulate.py` gives times, bubble and memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Literal

from megatron_lite.config.parallel import PipelineKind
from megatron_lite.errors import ConfigError

ActionKind = Literal["F", "B", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
COMPUTE: frozenset[str] = frozenset({"F", "B", "W"})
SPLIT_BACKWARD: frozenset[str] = frozenset({"zb-h1", "zb-v"})
"""Schedules in which B is the gradient of a stage's input only, and W the gradient of its weights."""


@dataclass(frozen=True)
class Action:
    """One thing that a rank does for one micro-batch of one of its own stages.

    F, B and W compute. SEND_F gives the output of `stage` to the next stage's rank, RECV_F takes the input of `stage`
    from the previous stage's; SEND_B gives the gradient of the input of `stage` to the previous stage's rank, RECV_B
    takes the gradient of the output of `stage` from the next stage's. `peer` is the other pipeline rank.
    """

    kind: ActionKind
    stage: int
    microbatch: int
    peer: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Action]]
_Op = tuple[Literal["F", "B", "W"], int]
"""Kind and chunk; the n-th occurrence of one is micro-batch n."""


def num_chunks(kind: PipelineKind, chunks: int = 1) -> int:
    """Model chunks of each rank: `chunks` where the schedule leaves the choice, and two under zb-v."""
    return 2 if kind == "zb-v" else chunks


def num_stages(kind: PipelineKind, pp: int, chunks: int = 1) -> int:
    """Pieces that the model is cut into."""
    return pp * num_chunks(kind, chunks)


def stage_of_chunk(kind: PipelineKind, pp: int, rank: int, chunk: int) -> int:
    """Stage that is chunk number `chunk` of pipeline rank `rank`.

    Chunks lie in rounds (rank 0 … p-1, then 0 … p-1 again), but in a V under zb-v: the second chunk goes back from
    rank p-1 to 0, so that rank 0 holds both ends of the model and rank p-1 passes its own output on to itself.
    """
    if kind == "zb-v" and chunk == 1:
        return 2 * pp - 1 - rank
    return chunk * pp + rank


def rank_of_stage(kind: PipelineKind, pp: int, stage: int) -> int:
    """Pipeline rank that holds `stage`."""
    if kind == "zb-v" and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def pipeline_schedule(kind: PipelineKind, pp: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """The compute actions of every pipeline rank, in order.

    Every number of micro-batches is allowed, none and fewer than ranks included. A pattern that needs more of them to
    unfold is laid out for more, and those beyond `num_microbatches` are left out again: micro-batches do not depend on
    each other, so what remains is still in a valid order.

    Raises:
        ConfigError: sizes that the schedule does not exist for.
    """
    _check(kind, pp, num_microbatches, chunks)
    return [
        _actions(_ops(kind, pp, rank, num_microbatches, chunks), kind, pp, rank, num_microbatches) for rank in range(pp)
    ]


def _check(kind: PipelineKind, pp: int, num_microbatches: int, chunks: int) -> None:
    if pp < 1 or num_microbatches < 0 or chunks < 1:
        raise ConfigError(
            "A pipeline has at least one rank and one model chunk, and no negative number of micro-batches",
            found=f"{pp} ranks, {chunks} chunks a rank, {num_microbatches} micro-batches",
            fix="Change --pp, --chunks or --microbatches",
        )
    if chunks > 1 and kind != "interleaved" and num_chunks(kind) != chunks:
        raise ConfigError(
            "Only the interleaved schedule takes any number of model chunks a rank (zb-v always has two)",
            found=f"{chunks} chunks a rank with {kind}",
            fix="Choose the interleaved schedule or leave out --num-layers-per-virtual-pipeline-stage",
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
    return _zb_h1(pp, rank, m) if kind == "zb-h1" else _zb_v(pp, rank, m)


def _one_forward_one_backward(forwards: Iterator[_Op], backwards: Iterator[_Op], warmup: int) -> Iterator[_Op]:
    """`warmup` forwards, then forwards and backwards in turn, then the backwards that are left."""
    for _ in range(warmup):
        yield from _next(forwards)
    for backward in backwards:
        yield from _next(forwards)
        yield backward


def _interleaved(pp: int, rank: int, m: int, chunks: int) -> Iterator[_Op]:
    """Narayanan et al. 2021 (arXiv:2104.04473), §2.2: a chunk takes a round of micro-batches, then the next chunk does.

    There a round is p micro-batches and p divides m. Here a round is at least p, and as even as m allows, so that the
    bubble is (p-1) / (v*m + p-1) for every m >= p; m < p is a round of p that is not all there.
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
    """Qi et al. 2023 (arXiv:2401.10241), ZB-H1: 1f1b whose weight gradients wait, on rank r, for r micro-batches.

    Every rank then holds p activations at the most, as rank 0 does under 1f1b, and the weight gradients put off fill
    the bubble at the end.
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
    """Qi et al. 2024 (arXiv:2405.15362), ZB-V: two chunks in a V, no bubble if F, B and W take the same time.

    Chunk 0 is on the way down the V and chunk 1 on the way up. A rank holds 2p half-size activations at the most, the
    memory of 1f1b. The pattern needs 2p - 1 micro-batches to unfold.
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
    # What is left of the backwards: p of chunk 0 and `rank` of chunk 1, with their weight gradients put off to the end.
    for _ in range(rank):
        yield from (("B", 0), ("B", 1))
    for _ in range(up):
        yield from (("B", 0), ("W", 0))
    yield from repeat(("W", 1), rank)
    yield from repeat(("W", 0), rank)


def _next(ops: Iterator[_Op]) -> Iterator[_Op]:
    """The next of `ops`, if there is one left."""
    for op in ops:
        yield op
        return
