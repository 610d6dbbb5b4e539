"""Argument parser of the commands: argparse with UTF-8 checked arguments and bounded numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
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
    """An ArgumentParser that refuses words that are not UTF-8, which no output could show and no tokenizer encode."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's."""
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if not is_utf8(word):
                self.error(f"arguments are UTF-8 text, {shown_bytes(word)} is not: convert it or rename the file")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End the command with one paragraph instead of all of the usage."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help\n")


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
"""Reader of a seed, with the bound of every seed: numpy's generators take 32 bits."""
