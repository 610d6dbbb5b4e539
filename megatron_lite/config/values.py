"""Parsers of plain flag values: integers, floats and booleans in the spellings of job scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_lite.formatting import format_number

TRUE_SPELLINGS = frozenset({"true", "1", "yes", "on"})
FALSE_SPELLINGS = frozenset({"false", "0", "no", "off"})

MAX_NUMBER = 10**15
"""Largest count that any flag accepts: products of two stay meaningful, and no run comes near."""

MAX_REAL = 1e38
"""Largest real number that any flag accepts: it fits fp32."""

MAX_SEED = 2**32 - 1
"""Largest seed: numpy's RandomState, which Megatron's sample order uses, takes 32 bits."""


def read_int(arg: str) -> int:
    """Read a whole number as 1000, 5_000_000, 1e4 or 10e6, between -MAX_NUMBER and MAX_NUMBER.

    Raises:
        ValueError: not a whole number, or one beyond these bounds.
    """
    try:
        number = int(arg)
    except ValueError:
        try:
            exact = float(arg)
        except ValueError:
            exact = math.nan
        if math.isnan(exact) or (math.isfinite(exact) and exact != int(exact)):
            raise ValueError("a whole number (1000, 5_000_000, 10e6)") from None
        number = int(max(-2.0 * MAX_NUMBER, min(exact, 2.0 * MAX_NUMBER)))
    if abs(number) > MAX_NUMBER:
        raise ValueError(f"a whole number of at most {format_number(MAX_NUMBER)}")
    return number


def read_float(arg: str) -> float:
    """Read a decimal number in Python's spellings, between -MAX_REAL and MAX_REAL.

    Raises:
        ValueError: not a number, not a finite one, or one beyond these bounds.
    """
    try:
        number = float(arg)
    except ValueError:
        raise ValueError("a number (0.1, 6.0e-5, .01)") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    if abs(number) > MAX_REAL:
        raise ValueError(f"a number of at most {format_number(MAX_REAL)}")
    return number


def shortened(arg: str) -> str:
    """Return an argument shortened for messages: a number may have thousands of digits."""
    return arg if len(arg) <= 40 else f"{arg[:37]}..."


def read_bool(arg: str) -> bool:
    """Read True or False in the usual spellings.

    Raises:
        ValueError: neither.
    """
    if arg.lower() in TRUE_SPELLINGS:
        return True
    if arg.lower() in FALSE_SPELLINGS:
        return False
    raise ValueError("True or False")


def read_as(annotation: Any, arg: str, spellings: Mapping[str, Any]) -> Any:
    """Read one argument as a value of a field's annotated type.

    Args:
        annotation: the field's type: int, float, str, bool, a Literal, or one of these or None.
        arg: the argument.
        spellings: further spellings of values, tried first.

    Raises:
        ValueError: with what was expected as its text.
    """
    for spelling, value in spellings.items():
        if arg.lower() == spelling.lower():
            return value
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        for choice in choices:
            if arg.lower() == str(choice).lower():
                return choice
        raise ValueError(f"one of {', '.join(dict.fromkeys([*map(str, choices), *spellings]))}")
    readers: dict[Any, Callable[[str], Any]] = {int: read_int, float: read_float, bool: read_bool, str: str}
    return readers[annotation](arg)


def write_value(value: Any) -> str:
    """Return the argument that is read back as this value."""
    if isinstance(value, float):
        return str(int(value)) if value == int(value) and abs(value) < 1e16 else repr(value)
    return str(value)


def is_utf8(text: str) -> bool:
    """Return True if a string of the operating system (an argument, a file's name) was valid UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown_bytes(text: str) -> str:
    """Return a string that is not UTF-8 as the bytes of the operating system, for messages."""
    try:
        return repr(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # not from the operating system
        return ascii(text)
