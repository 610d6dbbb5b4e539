"""String operations of bash: escapes, brace expansion, glob patterns, `${x%…}` and `${x/…}`, integer operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "f": "\f", "v": "\v"}
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
UNKNOWN = re.compile("\ue000(.*?)\ue001", re.DOTALL)


class UnknownValueError(Exception):
    """A value is needed that exists in the running job only."""


def unknown_text(source: str) -> str:
    """Return the marker of a value that exists in the running job only, with the name of its source."""
    without_blanks = re.sub(r"\s+", "\u00a0", source.strip())
    return f"\ue000{without_blanks}\ue001"


def unknown_sources(text: str) -> list[str]:
    """Return the sources of the unknown values in a text."""
    return [source.replace("\u00a0", " ") for source in UNKNOWN.findall(text)]


def matches(text: str, pattern: str) -> bool:
    """Return whether a text matches a glob pattern as a whole."""
    return re.fullmatch(translate(pattern), text) is not None


def decode_ansi(text: str) -> str:
    """Decode the escapes of $'…'."""

    def decode(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "xu":
            return chr(int(code[1:], 16))
        return chr(int(code, 8)) if code[0].isdigit() else ESCAPES.get(code, code)

    return re.sub(r"\\(x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{1,4}|[0-7]{1,3}|.)", decode, text, flags=re.DOTALL)


def brace_choices(text: str) -> list[str]:
    """Return the texts to which the {a,b} and {1..4} of a literal expand."""
    match = next((match for match in BRACES.finditer(text) if "," in match[1] or RANGE.fullmatch(match[1])), None)
    if match is None:
        return [text]
    if found := RANGE.fullmatch(match[1]):
        first, last, step = int(found[1]), int(found[2]), abs(int(found[3] or 1)) or 1
        items = [str(n) for n in (range(first, last + 1, step) if first <= last else range(first, last - 1, -step))]
    else:
        items = match[1].split(",")
    return [choice for item in items for choice in brace_choices(text[: match.start()] + item + text[match.end() :])]


def trim(text: str, op: str, pattern: str) -> str:
    """Apply `${x%pattern}`, `${x##pattern}`, `${x^^}` and the like."""
    if op in ("^", "^^", ",", ",,"):
        change = str.upper if op[0] == "^" else str.lower
        return change(text) if len(op) == 2 else change(text[:1]) + text[1:]
    lengths = range(len(text) + 1) if len(op) == 1 else range(len(text), -1, -1)
    for length in lengths:
        if op[0] == "%" and matches(text[len(text) - length :], pattern):
            return text[: len(text) - length]
        if op[0] == "#" and matches(text[:length], pattern):
            return text[length:]
    return text


def replace_pattern(text: str, pattern: str, new: str, count: int) -> str:
    """Apply `${x/pattern/new}`; count 0: every match."""
    anchor = pattern[:1] if pattern[:1] in ("#", "%") and count != 0 else ""
    expression = translate(pattern[len(anchor) :]).removesuffix(r"\Z").removesuffix(r"\z")
    expression = f"^{expression}" if anchor == "#" else f"{expression}$" if anchor == "%" else expression
    return re.sub(expression, lambda _: new, text, count=count) if pattern else text


def operate(op: str, left: int, right: int) -> int:
    """Apply a binary operator; division truncates towards zero.

    Raises:
        UnknownValueError: division by zero.
    """
    if op in ("/", "%"):
        if not right:
            raise UnknownValueError("division by 0")
        quotient = abs(left) // abs(right) * (1 if left * right >= 0 else -1)
        return quotient if op == "/" else left - quotient * right
    table: dict[str, Callable[[], int]] = {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "**": lambda: left**right,
        "<<": lambda: left << right,
        ">>": lambda: left >> right,
        "&": lambda: left & right,
        "|": lambda: left | right,
        "^": lambda: left ^ right,
        "==": lambda: int(left == right),
        "!=": lambda: int(left != right),
        "<": lambda: int(left < right),
        ">": lambda: int(left > right),
        "<=": lambda: int(left <= right),
        ">=": lambda: int(left >= right),
        ",": lambda: right,
    }
    return table[op]()
