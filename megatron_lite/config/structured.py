"""Parsers and writers of structured flag values: ramps, schedules, ranges, splits and blends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from megatron_lite.config.batch import Rampup, SequenceRamp
from megatron_lite.config.checkpoint import SavePhase
from megatron_lite.config.data import DataGroup, DataSource
from megatron_lite.config.values import read_float, read_int, write_value

BY_SIZE = "auto"
"""Stands for a weight in a group whose sources are weighted by their size."""
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def read_rampup(words: Sequence[str]) -> Rampup:
    """<start batch> <increment> <ramp-up samples>."""
    try:
        start, increment, samples = (read_int(word) for word in words)
    except ValueError:
        raise ValueError("three whole numbers: start batch, increment and samples of the ramp-up") from None
    return Rampup(start=start, increment=increment, samples=samples)


def write_rampup(rampup: Rampup) -> list[str]:
    """The three words of --rampup-batch-size."""
    return [str(rampup.start), str(rampup.increment), str(rampup.samples)]


def read_amount(word: str) -> int:
    """Read a whole number that may end in K, M, B or T, as 2.4B.

    Raises:
        ValueError: not a number, or not a whole one.
    """
    scale = SUFFIXES.get(word[-1:].lower())
    digits = word if scale is None else word[:-1]
    read_float(digits)  # refuses what Decimal alone would take, with a message
    number = Decimal(digits) * (scale or 1)
    if number != int(number):
        raise ValueError("a whole number after its suffix (2.4B)")
    return int(number)


def read_step_schedule(text: str, seq_length: int) -> tuple[tuple[int, int], ...]:
    """ "0:16 2.4B:320": from that many tokens on, this global batch. Gives (samples, batch) pairs, sorted.

    Raises:
        ValueError: not pairs, or no pair that starts at 0.
    """
    pairs = []
    for entry in re.split(r"[\s,]+", text.strip()):
        threshold, colon, batch = entry.partition(":")
        if not colon:
            raise ValueError("<tokens>:<batch> pairs, as in 0:16 2.4B:320")
        pairs.append((read_amount(threshold) // max(1, seq_length), read_int(batch)))
    pairs.sort()
    if pairs[0][0] != 0:
        raise ValueError("a first pair that starts at 0 tokens, as in 0:16 2.4B:320")
    if len({start for start, _ in pairs}) != len(pairs):
        raise ValueError("thresholds that differ by at least one sample")
    return tuple(pairs)


def read_save_schedule(text: str) -> tuple[SavePhase, ...]:
    """ "10:100 18:1000 1500": every 10 to iteration 100, every 18 to 1000, then every 1500.

    Raises:
        ValueError: not in that form.
    """
    expected = "<interval>:<last iteration> pairs and at most one closing <interval>, as in 10:100 18:1000 1500"
    phases: list[SavePhase] = []
    for entry in re.split(r"[\s,]+", text.strip()):
        interval, colon, until = entry.partition(":")
        if phases and not phases[-1].until:
            raise ValueError(expected)
        try:
            phases.append(SavePhase(interval=read_int(interval), until=read_int(until) if colon else 0))
        except ValueError:
            raise ValueError(expected) from None
    return tuple(phases)


def write_save_schedule(phases: tuple[SavePhase, ...]) -> list[str]:
    """The one word of --save-schedule."""
    return [" ".join(f"{phase.interval}:{phase.until}" if phase.until else str(phase.interval) for phase in phases)]


def read_ranges(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """ "2-5 10-20": inclusive ranges of iterations, sorted; a single number is a range of one."""
    ranges = []
    for word in " ".join(words).replace(",", " ").split():
        first, dash, last = word.partition("-")
        try:
            ranges.append((read_int(first), read_int(last) if dash else read_int(first)))
        except ValueError:
            raise ValueError("ranges of iterations, as in 101-200 251-300") from None
    return tuple(sorted(ranges))


def read_iterations(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """ "2 3 4": iterations, gathered into inclusive ranges."""
    ranges: list[tuple[int, int]] = []
    try:
        numbers = sorted({read_int(word) for word in " ".join(words).replace(",", " ").split()})
    except ValueError:
        raise ValueError("iterations, as in 101 102 251") from None
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return tuple(ranges)


def write_ranges(ranges: tuple[tuple[int, int], ...]) -> list[str]:
    """The words of --skip-train-iteration-range."""
    return [f"{first}-{last}" for first, last in ranges]


def read_sequence_ramp(words: Sequence[str]) -> SequenceRamp:
    """ "64:36000:8" (start:iterations:step, linear) or "0:64,1000:512" (first iteration:length, staged)."""
    expected = "start:iterations[:step], as in 64:36000:8, or stages as in 0:64,1000:512"
    entries = [entry.split(":") for entry in re.split(r"[\s,]+", " ".join(words).strip())]
    try:
        numbers = [[read_int(number) for number in entry] for entry in entries]
    except ValueError:
        raise ValueError(expected) from None
    if all(len(entry) == 2 for entry in numbers) and (len(numbers) > 1 or numbers[0][0] <= 1):
        return SequenceRamp(stages=tuple(sorted((first, length) for first, length in numbers)))
    if len(numbers) != 1 or len(numbers[0]) not in (2, 3):
        raise ValueError(expected)
    start, iterations, *step = numbers[0]
    return SequenceRamp(start=start, iterations=iterations, step=step[0] if step else SequenceRamp().step)


def write_sequence_ramp(ramp: SequenceRamp) -> list[str]:
    """The one word of --seq-length-warmup."""
    if ramp.stages:
        return [",".join(f"{first}:{length}" for first, length in ramp.stages)]
    return [f"{ramp.start}:{ramp.iterations}:{ramp.step}"]


def read_split(words: Sequence[str]) -> str:
    """Shares as 949,50,1, "969, 30, 1" or 949/50/1; kept as comma-separated numbers."""
    shares = [share for share in re.split(r"[\s,/]+", " ".join(words).strip()) if share]
    try:
        numbers = [read_float(share) for share in shares]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0:
        raise ValueError("one to three shares, as in 949,50,1")
    if not any(numbers):
        raise ValueError("shares that do not all vanish, as in 949,50,1")
    return ",".join(shares)


def read_sources(words: Sequence[str]) -> tuple[DataSource, ...]:
    """P, several paths, or weights and paths in turn, by Megatron's rule of telling them apart."""
    if len(words) % 2 == 0:
        try:
            weights = [read_float(word) for word in words[::2]]
        except ValueError:
            weights = []
        if weights:
            return tuple(
                DataSource(path=path, weight=weight) for weight, path in zip(weights, words[1::2], strict=True)
            )
    return tuple(DataSource(path=path) for path in words)


def write_sources(sources: tuple[DataSource, ...]) -> list[str]:
    """The words of --data-path."""
    words: list[str] = []
    for source in sources:
        words += [] if source.weight is None else [write_value(source.weight)]
        words.append(source.path)
    return words


def read_groups(words: Sequence[str]) -> tuple[DataGroup, ...]:
    """One string a group: "NAME: WEIGHT START:END PATH, WEIGHT START:END PATH".

    Raises:
        ValueError: not in that form, or a range that does not rise.
    """
    return tuple(_read_group(word) for word in words)


def _read_group(text: str) -> DataGroup:
    expected = '"NAME: WEIGHT START:END PATH, WEIGHT START:END PATH" with START < END'
    name, colon, rest = text.partition(":")
    sources = []
    for entry in rest.split(","):
        parts = entry.split()
        start, inner, end = parts[1].partition(":") if len(parts) == 3 else ("", "", "")
        if not colon or not inner:
            raise ValueError(expected)
        try:
            weight = None if parts[0] == BY_SIZE else read_float(parts[0])
            source = DataSource(path=parts[2], weight=weight, start=read_float(start), end=read_float(end))
        except ValueError:
            raise ValueError(expected) from None
        if not 0 <= source.start < source.end <= 1:
            raise ValueError(expected)
        sources.append(source)
    return DataGroup(name=name.strip(), sources=tuple(sources))


def read_groups_file(text: str) -> tuple[DataGroup, ...]:
    """The one line of a --train-weighted-split-paths-path file: groups in double quotes, separated by spaces."""
    line = text.strip()
    if "\n" in line or not (line.startswith('"') and line.endswith('"')):
        raise ValueError('a file of one line of groups in double quotes, as "en: 1 0:1 data/en" "fr: 1 0:1 data/fr"')
    return read_groups(line[1:-1].split('" "'))


def write_groups(groups: tuple[DataGroup, ...]) -> list[str]:
    """The words of --train-weighted-split-paths."""
    return [f"{group.name}: {', '.join(_write_source(source) for source in group.sources)}" for group in groups]


def _write_source(source: DataSource) -> str:
    weight = BY_SIZE if source.weight is None else write_value(source.weight)
    return f"{weight} {write_value(source.start)}:{write_value(source.end)} {source.path}"


def read_named_group(name: str) -> Any:
    """A reader of --train-data-path and its kin: a blend, as the one group of that split."""

    def read(words: Sequence[str]) -> tuple[DataGroup, ...]:
        return (DataGroup(name=name, sources=read_sources(words)),)

    return read
