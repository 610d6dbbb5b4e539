"""Early value exchange: gathers named values of all ranks before process groups exist, summarizes differences.

Without a process group, whose collectives would hang or abort where ranks have different layouts.
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
"""Longest time in seconds that rank 0 waits for the others to read why the job ends."""
MAX_LINES = 20
"""Differences shown; the number of others is given."""
MAX_VALUES = 4
"""Values shown of one difference."""
MAX_HOSTS = 8
"""Hosts shown of one value."""
MAX_TEXT = 160
"""Characters shown of one value, from shortly before its first difference."""


@dataclass(frozen=True)
class RankValues:
    """Values of one rank.

    Attributes:
        host: of the rank.
        values: text by name; the text includes the name, as `--lr 0.001`. A name that a rank leaves out is not compared
            with this rank.
        details: text by name, shown behind a value and not compared, such as the path of a file.
        failure: text of the error because of which the rank has no values; empty: none.
        checked: whether the rank tried to determine values; False: another rank of its node does.
    """

    host: str
    values: Mapping[str, str]
    details: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    checked: bool = True


@dataclass(frozen=True)
class Differences:
    """Result of a comparison, the same on every rank.

    Attributes:
        errors: one line per difference that ends the job, and per error of some ranks.
        warnings: one line per difference that does not end the job.
        differing: names whose values differ.
        common_failure: whether every rank that tried failed, all with the same error.
        rank: the first rank with a difference in `errors`.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    common_failure: bool = False
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Topic and error texts of a comparison, and the names whose values may differ.

    Attributes:
        topic: one word, for messages.
        problem: of the error where values differ.
        fix: of the error where values differ.
        warn: names whose differences are warnings.
        note: names whose differences are only listed in Differences.differing.
    """

    topic: str
    problem: str
    fix: str
    warn: frozenset[str] = frozenset()
    note: frozenset[str] = frozenset()


def find_differences(ranks: Sequence[RankValues], comparison: Comparison) -> Differences:
    """Compare the values of all ranks, given in the order of ranks."""
    hosts = [values.host for values in ranks]
    failed = _by_value((rank, values.failure) for rank, values in enumerate(ranks) if values.failure)
    errors = [f"{describe_ranks(holders, hosts)}: {text}" for text, holders in failed.items()]
    involved = [rank for holders in failed.values() for rank in holders]
    warnings, differing = [], []
    for name in dict.fromkeys(name for values in ranks for name in values.values):
        found = _by_value((rank, values.values[name]) for rank, values in enumerate(ranks) if name in values.values)
        if len(found) == 1:
            continue
        differing.append(name)
        if name in comparison.note:
            continue
        reference = reference_value(found)
        details = {text: ranks[holders[0]].details.get(name, "") for text, holders in found.items()}
        line = difference_line(found, reference, hosts, details)
        if name in comparison.warn:
            warnings.append(line)
        else:
            errors.append(line)
            involved += [holders[0] for text, holders in found.items() if text != reference]
    return Differences(
        errors=errors,
        warnings=warnings,
        differing=differing,
        common_failure=len(failed) == 1 and len(next(iter(failed.values()))) == sum(values.checked for values in ranks),
        rank=min(involved, default=0),
    )


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
        found: the ranks of each value, at least two values.
        reference: the value that is named last.
        hosts: of all ranks.
        details: by value, text shown behind the value.
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
) -> Differences:
    """Compare named values over all ranks; a collective call.

    Rank 0 reads a digest of each rank's values, and the values once per different digest.

    Args:
        store: the job's store (torch.distributed.Store); its timeout applies.
        launch: this rank's place in the job.
        comparison: topic, error texts, and which values may differ.
        values: see RankValues.
        number: number of the comparison in the job.
        details: see RankValues.
        failure: the error because of which this rank has no values.
        checked: see RankValues.

    Raises:
        RankDifferenceError: values differ, or some ranks failed. All ranks raise it, and rank 0 prints it.
        MegatronLiteError: `failure`, if every rank that tried failed with the same text.
    """
    topic = f"compare/{number} {comparison.topic}"
    rank_values = RankValues(
        launch.host or socket.gethostname(), dict(values), dict(details or {}), str(failure or ""), checked
    )
    record = json.dumps(asdict(rank_values))
    digest = hashlib.blake2b(record.encode(), digest_size=16).hexdigest()
    store.set(f"{topic}/record/{launch.rank}", record)
    store.set(f"{topic}/digest/{launch.rank}", digest)
    if launch.rank == 0:
        _wait(
            store, {f"{topic}/digest/{rank}": f"rank {rank}" for rank in range(launch.world_size)}, comparison, launch
        )
        ranks = _read_values(store, topic, launch.world_size)
        found = find_differences(ranks, comparison)
        store.set(f"{topic}/differences", json.dumps([asdict(found), ranks[found.rank].host]))
    _wait(store, {f"{topic}/differences": "rank 0"}, comparison, launch)
    fields, host = json.loads(store.get(f"{topic}/differences"))
    differences = Differences(**fields)
    if not differences.errors:
        return differences
    _leave(store, topic, launch)
    error = failure if differences.common_failure else None
    if error is None:
        lines = differences.errors[:MAX_LINES]
        if more := len(differences.errors) - len(lines):
            lines.append(f"and {more} more differences")
        listing = "".join(f"\n  {line}" for line in lines)
        error = RankDifferenceError(f"{comparison.problem}:{listing}\n", fix=comparison.fix)
        error.__cause__ = FailedRank(host, differences.rank)
    error.shared, error.silent = True, launch.rank != 0
    raise error


def _wait(store: Any, keys: Mapping[str, str], comparison: Comparison, launch: Launch) -> None:
    """Return once the keys are set. Waits in Python, so that signals are handled at once.

    Args:
        store: the job's store; its timeout applies.
        keys: with the ranks that set them.
        comparison: for the error.
        launch: for the error.

    Raises:
        TrainingError: a key is missing after the timeout.
    """
    seconds = store.timeout.total_seconds()
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            missing = [rank for key, rank in keys.items() if not store.check([key])]
            more = f" and {len(missing) - MAX_HOSTS} more" if len(missing) > MAX_HOSTS else ""
            raise TrainingError(
                f"The check that all ranks have the same {comparison.topic} timed out after {seconds:g} s: rank "
                f"{launch.rank} "
                f"of {launch.world_size} on {launch.host} received nothing from {', '.join(missing[:MAX_HOSTS])}{more}",
                fix=f"Read the output of {', '.join(missing[:MAX_HOSTS])}{more} for an error",
            )
        time.sleep(pause)
        pause = min(0.1, 1.5 * pause)


def _leave(store: Any, topic: str, launch: Launch) -> None:
    """Keep rank 0, whose process may hold the store, until all ranks have read the differences."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(RuntimeError):
        store.add(f"{topic}/read", 1)
        while launch.rank == 0 and time.monotonic() < deadline and store.add(f"{topic}/read", 0) < launch.world_size:
            time.sleep(0.02)


def _read_values(store: Any, topic: str, world_size: int) -> list[RankValues]:
    digests = store.multi_get([f"{topic}/digest/{rank}" for rank in range(world_size)])
    first = {digest: rank for rank, digest in reversed(list(enumerate(digests)))}
    read = {digest: RankValues(**json.loads(store.get(f"{topic}/record/{rank}"))) for digest, rank in first.items()}
    return [read[digest] for digest in digests]


def _by_value(pairs: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, text in pairs:
        found.setdefault(text, []).append(rank)
    return found


def _shorten(texts: Sequence[str]) -> Iterator[str]:
    """Shorten long texts to the first word and the part around the first difference."""
    same = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))))
    for text in texts:
        if len(text) <= MAX_TEXT:
            yield text
            continue
        start = min(max(0, same - MAX_TEXT // 4), len(text) - MAX_TEXT // 2)
        cut = text[start : start + MAX_TEXT]
        head = f"{text.split(maxsplit=1)[0]} …" if start else ""
        yield f"{head}{cut}{'…' if start + MAX_TEXT < len(text) else ''}"
