"""Speed measurements of a node check: matrix product, memory copies, bandwidth of mesh axes and between hosts.

A speed is that of the best repetition after a warm-up: other processes and interrupts only ever slow one down, while
a damaged, throttled or busy device is slow in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.ops.doctor.report import Link

Product = Callable[[Tensor, Tensor], Tensor]

GPU_SIDE, CPU_SIDE = 8192, 384
"""Rows and columns of the matrices. A product on a CPU takes less than a time slice: other processes on the host slow
down only some of them."""
GPU_COPY, CPU_COPY = 2**30, 2**26
"""Bytes of a memory copy."""
HOST_COPY_BYTES = 2**28
REPETITIONS = 5
"""Timed repetitions, at least; of a collective exactly, after two that are not timed."""


def matrix_speed(backend: Backend, *, seconds: float, product: Product = torch.mm) -> float:
    """Return the FLOP/s of a square matrix product, in bf16 on a GPU and fp32 on a CPU.

    Args:
        backend: of the device.
        seconds: of the repetitions; the first half warms the device up to its sustained clock.
        product: the function to measure.

    Raises:
        ValueError: repeated products of the same matrices differ.
    """
    cpu = backend.device.type == "cpu"
    side, dtype = (CPU_SIDE, torch.float32) if cpu else (GPU_SIDE, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(side, side, generator=generator).to(backend.device, dtype) for _ in range(2))
    first = product(a, b)
    last = first
    repeat = 1 if cpu else 20  # so that starting a kernel takes no part of the time

    def run() -> None:
        nonlocal last
        for _ in range(repeat):
            last = product(a, b)

    elapsed = _best_seconds(backend, run, seconds)
    if not torch.equal(first, last):
        raise ValueError("repeated products of the same matrices differ: the device computes wrong results")
    return 2.0 * side**3 * repeat / elapsed


def copy_speed(backend: Backend, *, seconds: float) -> float:
    """Return the bytes/s of a copy within the device's memory, read and written bytes counted."""
    size = CPU_COPY if backend.device.type == "cpu" else GPU_COPY
    source = torch.ones(size, dtype=torch.uint8, device=backend.device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(backend, lambda: target.copy_(source), seconds)


def host_copy_speed(backend: Backend, *, seconds: float) -> float:
    """Return the bytes/s of a copy from pinned host memory to the device."""
    source = torch.ones(HOST_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(HOST_COPY_BYTES, dtype=torch.uint8, device=backend.device)
    return HOST_COPY_BYTES / _best_seconds(backend, lambda: target.copy_(source, non_blocking=True), seconds)


def axis_links(backend: Backend, group: Group, size: int) -> list[Link]:
    """Measure the operations that training uses on an axis; a collective call of the group.

    Args:
        backend: of this rank.
        group: tp or dp: all-reduce and all-gather; pp: send and receive between neighbouring stages.
        size: bytes of the message.
    """
    if group.axis == "pp":
        pairs = [(place, place + 1) for place in range(group.size - 1)]
        return pair_links(backend, group, pairs, size, group.axis)
    links = []
    count = max(group.size, size // 2 // group.size * group.size)
    whole = torch.ones(count, dtype=torch.bfloat16, device=backend.device)
    part = whole[: count // group.size].clone()
    share = (group.size - 1) / group.size  # bytes that each rank sends and receives in a ring, per byte of the whole
    for operation, run, factor in (
        ("all-reduce", lambda: group.all_reduce_(whole), 2 * share),
        ("all-gather", lambda: group.all_gather_(whole, part), share),
    ):
        elapsed = _best_of(backend, run)
        links.append(
            Link(
                axis=group.axis,
                operation=operation,
                ranks=group.ranks,
                size=2 * count,
                bandwidth=factor * 2 * count / elapsed,
            )
        )
    return links


def pair_links(backend: Backend, group: Group, pairs: Sequence[tuple[int, int]], size: int, axis: str) -> list[Link]:
    """Measure send and receive of pairs of coordinates, in both directions at once; a collective call of the group.

    Pairs that share a coordinate follow each other, so that no link is measured while another one uses its host.
    """
    # A transport connects all ranks of a group at its first collective.
    group.all_reduce_(torch.ones(1, device=backend.device))
    links = []
    for pairs_of_round in rounds(pairs):
        for pair in pairs_of_round:
            if group.rank not in pair:
                continue
            peer = pair[0] if group.rank == pair[1] else pair[1]
            sent = torch.ones(max(1, size // 2), dtype=torch.bfloat16, device=backend.device)
            received = torch.empty_like(sent)

            def run(sent: Tensor = sent, received: Tensor = received, peer: int = peer) -> None:
                for work in group.exchange([(sent, peer)], [(received, peer)]):
                    work.wait()

            elapsed = _best_of(backend, run)
            ranks = tuple(sorted(group.ranks[place] for place in pair))
            size_sent = 2 * sent.numel()
            links.append(
                Link(axis=axis, operation="send-recv", ranks=ranks, size=size_sent, bandwidth=size_sent / elapsed)
            )
        group.all_reduce_(torch.ones(1, device=backend.device))
    return links


def host_pairs(hosts: Mapping[int, str]) -> list[tuple[int, int]]:
    """Return the pairs of first ranks of neighbouring hosts, in a ring.

    Args:
        hosts: of each rank.
    """
    firsts = list({host: rank for rank, host in sorted(hosts.items(), reverse=True)}.values())
    firsts.sort()
    if len(firsts) < 3:
        return [(firsts[0], firsts[1])] if len(firsts) == 2 else []
    return list(zip(firsts, [*firsts[1:], firsts[0]], strict=True))


def rounds(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Arrange pairs in rounds in which no member occurs twice."""
    arranged: list[list[tuple[int, int]]] = []
    for pair in pairs:
        free = (taken for taken in arranged if not any(set(pair) & set(other) for other in taken))
        place = next(free, None)
        if place is None:
            arranged.append([pair])
        else:
            place.append(pair)
    return arranged


def _best_seconds(backend: Backend, run: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of the repetitions in the second half of `seconds`, of at least REPETITIONS."""
    run()
    backend.synchronize()
    times: list[float] = []
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds or len(times) < REPETITIONS:
        run()
        backend.synchronize()
        if now >= began + seconds / 2:
            times.append(time.monotonic() - now)
    return max(min(times), 1e-9)


def _best_of(backend: Backend, run: Callable[[], object]) -> float:
    best = float("inf")
    for number in range(REPETITIONS + 2):
        backend.synchronize()
        began = time.monotonic()
        run()
        backend.synchronize()
        if number >= 2:
            best = min(best, time.monotonic() - began)
    return max(best, 1e-9)
