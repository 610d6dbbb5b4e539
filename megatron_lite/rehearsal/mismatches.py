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
                places = ranks.index(one.rank), ranks.index(other.rank)
                found += list(_first_difference(axis, places, one, other))
    return found


def _first_difference(axis: str, places: tuple[int, int], one: RankReport, other: RankReport) -> Iterator[str]:
    for plan, mine, theirs in zip(one.plans, one.iterations, other.iterations, strict=True):
        if mine is None or theirs is None:
            continue
        for kind, calls, others in _to_compare(axis, places, mine, theirs):
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
    axis: str, places: tuple[int, int], mine: IterationRecord, theirs: IterationRecord
) -> Iterator[tuple[str, list[str], list[str]]]:
    here, there = places
    yield (
        "collective",
        [_describe(t) for t in mine.transfers if t.axis == axis and t.peer is None],
        [_describe(t) for t in theirs.transfers if t.axis == axis and t.peer is None],
    )
    yield "message", _messages(mine, axis, "send", there), _messages(theirs, axis, "receive", here)
    yield "message", _messages(mine, axis, "receive", there), _messages(theirs, axis, "send", here)


def _messages(record: IterationRecord, axis: str, kind: str, peer: int) -> list[str]:
    return [
        f"{t.elements:,} x {t.dtype}" for t in record.transfers if t.axis == axis and t.kind == kind and t.peer == peer
    ]


def _describe(transfer: Transfer) -> str:
    # Ranks may send objects of different pickled sizes.
    size = "" if transfer.kind == "object" else f" of {transfer.elements:,} x {transfer.dtype}"
    return f"{transfer.kind}{size}"


def _at(entries: list[str], number: int) -> str:
    return entries[number] if number < len(entries) else "nothing"
