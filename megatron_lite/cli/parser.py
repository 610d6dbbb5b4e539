"""Argument parser of all commands except `train`: argparse with UTF-8 checks and bounded number types."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_lite.config.values import (
    MAX_NUMBER,
    MAX_REAL,
    MAX_SEED,
    is_utf8,
    read_float,
    read_int,
    shortened,
    shown_bytes,
)
from megatron_lite.formatting import format_number


class Parser(argparse.ArgumentParser):
    """ArgumentParser that rejects abbreviated flags, and arguments that can be neither printed nor tokenized.

    Args:
        abbreviated: flags that may be abbreviated, as in the command lines of another program.
        options: of ArgumentParser.
    """

    def __init__(self, *, abbreviated: Collection[str] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=bool(abbreviated), **options)
        self._abbreviated = frozenset(abbreviated)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """Parse as argparse does, after the UTF-8 check."""
        given = list(sys.argv[1:] if args is None else args)
        for word in given:
            if not is_utf8(word):
                self.error(f"arguments are UTF-8 text, {shown_bytes(word)} is not: convert it or rename the file")
        return super().parse_known_args(given, namespace)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Accept an abbreviation of several spellings of one flag, which argparse before 3.14 calls ambiguous."""
        found: list[Any] = super()._get_option_tuples(option_string)
        matches = [match for match in found if self._abbreviated.intersection(match[0].option_strings)]
        return matches[:1] if len({id(match[0]) for match in matches}) == 1 else matches

    def error(self, message: str) -> NoReturn:
        """Print one paragraph without the usage text, and exit."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help\n")


def file_path(text: str) -> Path:
    """Return the path of an argument, which is not empty: an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def whole(least: int = 0, most: int = MAX_NUMBER) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` to `most`, for add_argument's `type`."""

    def read(word: str) -> int:
        try:
            number = read_int(word)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            bounds = f"from {format_number(least)} to {format_number(most)}"
            raise argparse.ArgumentTypeError(f"{shortened(word)!r} is not a whole number {bounds}")
        return number

    return read


def real(least: float = 0.0, most: float = MAX_REAL, *, above: bool = False) -> Callable[[str], float]:
    """Return a reader of numbers from `least` (or above it) to `most`, for add_argument's `type`."""

    def read(word: str) -> float:
        bounds = f"{'above' if above else 'from'} {format_number(least)} to {format_number(most)}"
        try:
            number = read_float(word)
        except ValueError:
            number = float("nan")
        if not least <= number <= most or (above and number == least):
            raise argparse.ArgumentTypeError(f"{shortened(word)!r} is not a number {bounds}")
        return number

    return read


seed = whole(0, MAX_SEED)
"""Reader of a seed; numpy's generators take 32 bits."""
