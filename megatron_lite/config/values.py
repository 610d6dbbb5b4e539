"""Words of a command line to plain values: the spellings of numbers that job scripts use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})


def read_int(word: str) -> int:
    """Whole numbers as 1000, 5_000_000, 1e4 or 10e6.

    Raises:
        ValueError: not a whole number.
    """
    try:
        return int(word)
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        raise ValueError("a whole number (1000, 5_000_000, 10e6)") from None
    if number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise ValueError("a whole number (1000, 5_000_000, 10e6)")
    return int(number)


def read_float(word: str) -> float:
    """Decimal numbers in Python's spellings; not-a-number and infinities are refused.

    Raises:
        ValueError: not a finite number.
    """
    try:
        number = float(word)
    except ValueError:
        raise ValueError("a number (0.1, 6.0e-5, .01)") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("a finite number")
    return number


def read_bool(word: str) -> bool:
    """True or False in the usual spellings.

    Raises:
        ValueError: neither.
    """
    if word.lower() in TRUE_WORDS:
        return True
    if word.lower() in FALSE_WORDS:
        return False
    raise ValueError("True or False")


def read_as(annotation: Any, word: str, spellings: Mapping[str, Any]) -> Any:
    """One word as a value of a field's annotated type.

    Args:
        annotation: the field's type: int, float, str, bool, a Literal, or one of these or None.
        word: what the command line says.
        spellings: words that stand for a value, tried first.

    Raises:
        ValueError: with what was expected as its text.
    """
    for spelling, value in spellings.items():
        if word.lower() == spelling.lower():
            return value
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        for choice in choices:
            if word.lower() == str(choice).lower():
                return choice
        raise ValueError(f"one of {', '.join(dict.fromkeys([*map(str, choices), *spellings]))}")
    readers: dict[Any, Callable[[str], Any]] = {int: read_int, float: read_float, bool: read_bool, str: str}
    return readers[annotation](word)


def write_value(value: Any) -> str:
    """A plain value as the word that reads back as it."""
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) < 1e16 else repr(value)
    return str(value)
