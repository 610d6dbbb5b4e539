"""Value suggestions in error messages: divisors and nearest multiples of a number."""

from __future__ import annotations

from math import gcd, isqrt

SHOWN = 8
"""Divisors that an error suggests at most."""


def divisors(number: int, *others: int) -> str:
    """Return the common divisors, as an error suggests them: "1, 2, 4 or 8"."""
    number = gcd(number, *others)
    small = [size for size in range(1, isqrt(number) + 1) if not number % size]
    found = [str(size) for size in sorted({*small, *(number // size for size in small)})]
    if len(found) > SHOWN:
        return f"{', '.join(found[:SHOWN])} or another divisor of {number}"
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def nearest_multiples(number: int, step: int) -> str:
    """Return the multiples of `step` on both sides of `number`, as an error suggests them: "6 or 9"."""
    below = number // step * step
    return f"{below} or {below + step}" if below else str(step)
