"""Bound checks shared by validation rules, and suggestions of sizes that divide evenly."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.errors import ConfigError

SHOWN = 8
"""Divisors that an error suggests at most."""


def at_least(bound: float, **numbers: float) -> Iterator[ConfigError]:
    """Yield an error for each flag (its name with underscores) whose number is less than `bound`."""
    for name, number in numbers.items():
        flag = "--" + name.replace("_", "-")
        if number < bound:
            yield ConfigError(
                f"{flag} is at least {bound:g}", found=f"{flag} {number:g}", fix=f"Give {flag} {bound:g} or more"
            )


def share(*, open_end: bool = False, **numbers: float) -> Iterator[ConfigError]:
    """Yield an error for each flag whose number does not lie in [0, 1], or in [0, 1) if `open_end`."""
    for name, number in numbers.items():
        flag = "--" + name.replace("_", "-")
        if not 0 <= number <= 1 or (open_end and number == 1):
            bounds = "in [0, 1)" if open_end else "in [0, 1]"
            fix = f"Give {flag} a share from 0 {'to below' if open_end else 'to'} 1, such as 0.1"
            yield ConfigError(f"{flag} lies {bounds}", found=f"{flag} {number:g}", fix=fix)


def divisors(number: int, *others: int) -> str:
    """The common divisors, as an error suggests them: "1, 2, 4 or 8"."""
    found = [str(size) for size in range(1, number + 1) if not any(value % size for value in (number, *others))]
    if len(found) > SHOWN:
        return f"{', '.join(found[:SHOWN])} or another divisor of {number}"
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def nearest_multiples(number: int, step: int) -> str:
    """The multiples of `step` on both sides of `number`, as an error suggests them: "6 or 9"."""
    below = number // step * step
    return f"{below} or {below + step}" if below else str(step)
