"""Formatting of sizes, counts and durations for messages: bytes, parameters, perplexities, shapes, rank ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_RANGES = 8
"""Rank ranges that a message lists."""


def size_unit(size: float) -> tuple[int, str]:
    """Return the unit in which a number of bytes has one to three digits before its point, and the unit's name."""
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(len(names)) if abs(size) < 1000 * 1024**power), len(names) - 1)
    return 1024**power, names[power]


def format_size(size: float) -> str:
    """Return a number of bytes with three digits and its unit.

    >>> format_size(999), format_size(2_034_236), format_size(10**16)
    ('999 B', '1.94 MiB', '9,095 TiB')
    """
    unit, name = size_unit(size)
    number = size / unit
    return f"{number:.3g} {name}" if number < 1000 else f"{number:,.0f} {name}"


def format_parameters(parameters: int) -> str:
    """Return a number of parameters as models are named: 125M, 1.3B, 13B, 176B.

    >>> format_parameters(12_853_575_680), format_parameters(1_315_000_000), format_parameters(124_439_808)
    ('13B', '1.3B', '124M')
    """
    for scale, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= scale * 0.9995:
            number = parameters / scale
            return f"{number:.1f}{suffix}" if number < 9.95 else f"{number:.0f}{suffix}"
    return str(parameters)


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds, after the days if there are any.

    >>> format_duration(184), format_duration(183_845.4), format_duration(math.inf)
    ('00:03:04', '2d 03:04:05', 'unknown')
    """
    if not math.isfinite(seconds):
        return "unknown"
    days, rest = divmod(max(0, round(seconds)), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def format_time(seconds: float) -> str:
    """Return a duration, below a minute as seconds with three digits.

    >>> format_time(0.01234), format_time(36), format_time(184), format_time(0)
    ('0.0123 s', '36 s', '00:03:04', '0 s')
    """
    return f"{seconds:.3g} s" if seconds < 59.5 else format_duration(seconds)


def format_number(number: float) -> str:
    """Return a number with separators of thousands, or its power of ten if it is long.

    >>> format_number(65535), format_number(10**15), format_number(0.5)
    ('65,535', '1e+15', '0.5')
    """
    return f"{number:,}" if isinstance(number, int) and abs(number) < 10**10 else f"{number:g}"


def format_short(number: float) -> str:
    """Return a rate or count with three digits and k, M, G or T.

    >>> format_short(999), format_short(12_345), format_short(2.5e9)
    ('999', '12.3k', '2.5G')
    """
    for suffix in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.0f}{suffix}" if not suffix or abs(number) >= 99.95 else f"{number:.1f}{suffix}"
        number /= 1000.0
    return f"{number:.1f}T"


def format_count(number: int, noun: str) -> str:
    """Return a number and its noun.

    >>> format_count(1, "file"), format_count(1200, "file")
    ('1 file', '1,200 files')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_perplexity(perplexity: float) -> str:
    """Return a perplexity with two decimals, or its power of ten from a million on.

    >>> format_perplexity(2345.678), format_perplexity(1.5e9)
    ('2,345.68', '1.50e+09')
    """
    return f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


def format_shape(shape: Sequence[int]) -> str:
    """Return a tensor's shape.

    >>> format_shape((2, 3)), format_shape(())
    ('2 x 3', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"


def format_ranges(ranks: Sequence[int]) -> str:
    """Return ascending ranks as ranges, the first MAX_RANGES of them.

    >>> format_ranges([1, 4, 5, 6, 7]), format_ranges(range(0, 40, 2))
    ('1, 4-7', '0, 2, 4, 6, 8, 10, 12, 14 and 12 more')
    """
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ranges[:MAX_RANGES])
    more = sum(last - first + 1 for first, last in ranges[MAX_RANGES:])
    return f"{shown} and {more:,} more" if more else shown
