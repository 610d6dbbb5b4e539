"""What several rules ask: that a number lies within bounds."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.errors import ConfigError


def at_least(bound: float, **numbers: float) -> Iterator[ConfigError]:
    """Yield an error for each flag (its name with underscores) whose number is less than `bound`."""
    for name, number in numbers.items():
        flag = "--" + name.replace("_", "-")
        if number < bound:
            yield ConfigError(f"{flag} is at least {bound:g}", found=f"{flag} {number:g}", fix=f"Correct {flag}")


def share(*, open_end: bool = False, **numbers: float) -> Iterator[ConfigError]:
    """Yield an error for each flag whose number does not lie in [0, 1], or in [0, 1) if `open_end`."""
    for name, number in numbers.items():
        flag = "--" + name.replace("_", "-")
        if not 0 <= number <= 1 or (open_end and number == 1):
            bounds = "in [0, 1)" if open_end else "in [0, 1]"
            yield ConfigError(f"{flag} lies {bounds}", found=f"{flag} {number:g}", fix=f"Correct {flag}")
