"""Comparison of named values over all ranks: exchange through the rendezvous store, summary of the differences.

It needs no process group, whose collectives would hang or abort where ranks disagree about the layout.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

from megatron_lite.backend.environment import Launch
from megatron_lite.errors import FailedRank, MegatronLiteError, RankDifferenceError, TrainingError
from megatron_lite.formatting import format_ranges

GRACE = 10.0
"""Seconds that rank 0 waits at most for the others to read why the job ends."""
MAX_LINES = 20
"""Differences shown; the number of others is given."""
MAX_VALUES = 4
"""Values shown of one difference."""
MAX_HOSTS = 8
"""Hosts shown of one value."""
MAX_TEXT = 160
"""Characters shown of one value, from shortly before its first difference."""


@dataclass(frozen=True)
class Statement:
    """Values of one rank.

    Attributes:
        host: where the rank runs.
        values: text by name, where the text says what it is the value of. A name that a rank leaves out is not compared
            with this rank.
        details: by name, what is shown behind a value and not compared, such as the path of a file.
        failure: text of the error that kept the rank from having values; empty: none.
        checked: whether the rank tried to have values; False where another rank of its node does so.
    """

    host: str
    values: Mapping[str, str]
    details: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    checked: bool = True


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison, the same on every rank.

    Attributes:
        errors: one line per difference that ends the job, and per failure of some ranks.
        warnings: one line per difference that does not.
        differing: names whose values differ.
        common_failure: whether every rank that tried failed, all with the same error.
        rank: the first rank that differs or failed, for errors.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    common_failure: bool = False
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison is about.

    Attributes:
        topic: in one word.
        rule: of the error that a difference is.
        fix: of that error.
        warn: names whose differences are warnings.
        note: names whose differences are only listed in Verdict.differing.
    """

    topic: str
    rule: str
    fix: str
    warn: frozenset[str] = frozenset()
    note: frozenset[str] = frozenset()


def judge(statements: Sequence[Statement], comparison: Comparison) -> Verdict:
    """Compare the statements of all ranks, in the order of ranks."""
    hosts = [statement.host for statement in statements]
    failed = _by_value((rank, s.failure) for rank, s in enumerate(statements) if s.failure)
    checked = sum(statement.checked for statement in statements)
    common = len(failed) == 1 and len(next(iter(failed.values()))) == checked
    verdict = Verdict(common_failure=common)
    involved = [rank for ranks in failed.values() for rank in ranks]
    for text, ranks in failed.items():
        verdict.errors.append(f"{describe_ranks(ranks, hosts)}: {text}")
    for name in dict.fromkeys(name for statement in statements for name in statement.values):
        found = _by_value((rank, s.values[name]) for rank, s in enumerate(statements) if name in s.values)
        if len(found) == 1:
            continue
        verdict.differing.append(name)
        if name in comparison.note:
            continue
        reference = reference_value(found)
        details = {text: statements[ranks[0]].details.get(name, "") for text, ranks in found.items()}
        line = difference_line(found, reference, hosts, details)
        (verdict.warnings if name in comparison.warn else verdict.errors).append(line)
        if name not in comparison.warn:
            involved += [ranks[0] for text, ranks in found.items() if text != reference]
    return Verdict(**{**asdict(verdict), "rank": min(involved, default=0)})


def reference_value(found: Mapping[str, Sequence[int]]) -> str:
    """Return the value of more than half of the ranks; without such a majority, that of the first rank."""
    total = sum(map(len, found.values()))
    majority = [text for text, ranks in found.items() if 2 * len(ranks) > total]
    return majority[0] if majority else min(found, key=lambda text: found[text][0])


def difference_line(
    found: Mapping[str, Sequence[int]], reference: str, hosts: Sequence[str], details: Mapping[str, str] | None = None
) -> str:
    """Describe one difference: `--lr 0.001 on ranks 8-15 (n2), --lr 0.0001 on the other 248 ranks`.

    Args:
        found: the ranks of each value, more than one value.
        reference: the value that is named last.
        hosts: of all ranks.
        details: by value, what is shown behind it.
    """
    shown = dict(zip(found, _shorten(list(found)), strict=True))
    for text, detail in (details or {}).items():
        shown[text] += f" ({detail})" if detail else ""
    others = sorted((text for text in found if text != reference), key=lambda text: found[text][0])
    parts = [f"{shown[text]} on {describe_ranks(found[text], hosts)}" for text in others[:MAX_VALUES]]
    if hidden := others[MAX_VALUES:]:
        ranks = sorted(rank for text in hidden for rank in found[text])
        parts.append(f"{len(hidden)} other values on {describe_ranks(ranks, hosts)}")
    rest = found[reference]
    last = describe_ranks(rest, hosts) if len(rest) == 1 else f"the other {len(rest)} ranks"
    return ", ".join([*parts, f"{shown[reference]} on {last}"])


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name ranks and their hosts: `rank 3 (n1)`, `ranks 8-15 (n2)`, `all ranks`.

    Args:
        ranks: in rising order.
        hosts: of all ranks.
    """
    if len(ranks) == len(hosts) > 1:
        return "all ranks"
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    places = ", ".join(names[:MAX_HOSTS])
    places += f" and {len(names) - MAX_HOSTS} more hosts" if len(names) > MAX_HOSTS else ""
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {format_ranges(ranks)} ({places})"


def compare_over_store(
    store: Any,
    launch: Launch,
    comparison: Comparison,
    values: Mapping[str, str],
    *,
    number: int = 0,
    details: Mapping[str, str] | None = None,
    failure: MegatronLiteError | None = None,
    checked: bool = True,
) -> Verdict:
    """Compare named values with those of all other ranks; every rank calls it, and waits for the slowest.

    Rank 0 reads a digest of each rank's values, and the values only once per different digest.

    Args:
        store: where the ranks met (torch.distributed.Store); its own timeout applies.
        launch: this rank's place in the job.
        comparison: what is compared, and what a difference means.
        values: text by name, as Statement has them.
        number: distinguishes the job's calls; the same on all ranks.
        details: as Statement.
        failure: the error that kept this rank from having values.
        checked: as Statement.

    Raises:
        RankDifferenceError: values differ, or some ranks failed. All ranks raise it, and rank 0 prints it.
        MegatronLiteError: `failure`, where every rank that tried failed with the same text.
    """
    topic = f"compare/{number} {comparison.topic}"
    statement = Statement(
        launch.host or socket.gethostname(), dict(values), dict(details or {}), str(failure or ""), checked
    )
    record = json.dumps(asdict(statement))
    digest = hashlib.blake2b(record.encode(), digest_size=16).hexdigest()
    store.set(f"{topic}/record/{launch.rank}", record)
    store.set(f"{topic}/digest/{launch.rank}", digest)
    if launch.rank == 0:
        _wait(
            store, {f"{topic}/digest/{rank}": f"rank {rank}" for rank in range(launch.world_size)}, comparison, launch
        )
        statements = _read_statements(store, topic, launch.world_size)
        judged = judge(statements, comparison)
        store.set(f"{topic}/verdict", json.dumps([asdict(judged), statements[judged.rank].host]))
    _wait(store, {f"{topic}/verdict": "rank 0"}, comparison, launch)
    told, host = json.loads(store.get(f"{topic}/verdict"))
    verdict = Verdict(**told)
    if not verdict.errors:
        return verdict
    _leave(store, topic, launch)
    error = failure if verdict.common_failure else None
    if error is None:
        lines = verdict.errors[:MAX_LINES]
        if more := len(verdict.errors) - len(lines):
            lines.append(f"and {more} more differences")
        found = "".join(f"\n  {line}" for line in lines) + "\n"
        error = RankDifferenceError(comparison.rule, found=found, fix=comparison.fix)
        error.__cause__ = FailedRank(host, verdict.rank)
    error.shared, error.silent = True, launch.rank != 0
    raise error


def _wait(store: Any, keys: Mapping[str, str], comparison: Comparison, launch: Launch) -> None:
    """Return once the keys are there. Waits in Python, so that signals are obeyed at once.

    Args:
        store: its timeout applies.
        keys: with the ranks that set them.
        comparison: for the error.
        launch: for the error.

    Raises:
        TrainingError: some are missing when the time is over.
    """
    seconds = store.timeout.total_seconds()
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            missing = [rank for key, rank in keys.items() if not store.check([key])]
            more = f" and {len(missing) - MAX_HOSTS} more" if len(missing) > MAX_HOSTS else ""
            raise TrainingError(
                "All ranks of a job must compare what they have in common",
                found=f"rank {launch.rank} of {launch.world_size} on {launch.host} waited {seconds:g} s for the "
                f"{comparison.topic} of {', '.join(missing[:MAX_HOSTS])}{more}",
                fix="See the output of these ranks",
            )
        time.sleep(pause)
        pause = min(0.1, 1.5 * pause)


def _leave(store: Any, topic: str, launch: Launch) -> None:
    """Keep rank 0, whose process may hold the store, until all ranks have read why the job ends."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(RuntimeError):
        store.add(f"{topic}/read", 1)
        while launch.rank == 0 and time.monotonic() < deadline and store.add(f"{topic}/read", 0) < launch.world_size:
            time.sleep(0.02)


def _read_statements(store: Any, topic: str, world_size: int) -> list[Statement]:
    digests = store.multi_get([f"{topic}/digest/{rank}" for rank in range(world_size)])
    first = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
    read = {digest: Statement(**json.loads(store.get(f"{topic}/record/{rank}"))) for digest, rank in first.items()}
    return [read[digest] for digest in digests]


def _by_value(pairs: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, text in pairs:
        found.setdefault(text, []).append(rank)
    return found


def _shorten(texts: Sequence[str]) -> Iterator[str]:
    """Cut long texts to their first word and the neighbourhood of their first difference."""
    same = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))))
    for text in texts:
        if len(text) <= MAX_TEXT:
            yield text
            continue
        start = min(max(0, same - MAX_TEXT // 4), len(text) - MAX_TEXT // 2)
        cut = text[start : start + MAX_TEXT]
        head = f"{text.split(maxsplit=1)[0]} …" if start else ""
        yield f"{head}{cut}{'…' if start + MAX_TEXT < len(text) else ''}"
