"""Deadlock check of a rehearsal: compares the collective calls of the simulated ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from megatron_lite.backend.accounting import Transfer
from megatron_lite.rehearsal.dry_run import IterationRecord, RankReport


def call_mismatches(reports: Sequence[RankReport]) -> list[str]:
    """Describe the first difference of every two ranks along each axis that they share.

    Ranks whose dry run ended with an error are not compared.
    """
    complete = [report for report in reports if not report.error]
    found = []
    for one, other in combinations(complete, 2):
        transfers = [t for report in (one, other) for record in report.iterations if record for t in record.transfers]
        for axis, ranks in dict.fromkeys((transfer.axis, transfer.ranks) for transfer in transfers):
            if one.rank in ranks and other.rank in ranks:
                coordinates = ranks.index(one.rank), ranks.index(other.rank)
                found += list(_first_difference(axis, coordinates, one, other))
    return found


def _first_difference(axis: str, coordinates: tuple[int, int], one: RankReport, other: RankReport) -> Iterator[str]:
    for plan, first, second in zip(one.plans, one.iterations, other.iterations, strict=True):
        if first is None or second is None:
            continue
        for kind, calls, others in _to_compare(axis, coordinates, first, second):
            differs = next((n for n, (a, b) in enumerate(zip(calls, others, strict=False)) if a != b), None)
            if differs is None and len(calls) == len(others):
                continue
            number = min(len(calls), len(others)) if differs is None else differs
            yield (
                f"iteration {plan.iteration:,}: ranks {one.rank} and {other.rank} differ in {kind} number {number + 1} "
                f"along {axis}: {_at(calls, number)} against {_at(others, number)}"
            )
            return


def _to_compare(
    axis: str, coordinates: tuple[int, int], first: IterationRecord, second: IterationRecord
) -> Iterator[tuple[str, list[str], list[str]]]:
    first_rank, second_rank = coordinates
    yield (
        "collective",
        [_describe(t) for t in first.transfers if t.axis == axis and t.peer is None],
        [_describe(t) for t in second.transfers if t.axis == axis and t.peer is None],
    )
    yield "message", _messages(first, axis, "send", second_rank), _messages(second, axis, "receive", first_rank)
    yield "message", _messages(first, axis, "receive", second_rank), _messages(second, axis, "send", first_rank)


def _messages(record: IterationRecord, axis: str, kind: str, peer: int) -> list[str]:
    return [
        f"{t.elements:,} x {t.dtype}" for t in record.transfers if t.axis == axis and t.kind == kind and t.peer == peer
    ]


def _describe(transfer: Transfer) -> str:
    # Ranks may send objects of different pickled sizes.
    size = "" if transfer.kind == "object" else f" of {transfer.elements:,} x {transfer.dtype}"
    return f"{transfer.kind}{size}"


def _at(entries: list[str], number: int) -> str:
    return entries[number] if number < len(entries) else "none"
