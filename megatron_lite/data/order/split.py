"""Train/validation/test split of a dataset: parsing of --split, and the rounding rules of both Megatron generations."""

from __future__ import annotations

import re
from typing import Literal

from megatron_lite.errors import ConfigError

Order = Literal["legacy", "modern"]


def parse_split(split: str, order: Order) -> tuple[float, float, float]:
    """Return the shares of training, validation and test, summing to 1 (Megatron's forms: '949,50,1', '8/1/1', '1').

    Raises:
        ConfigError: the text contains something other than numbers, or no number above 0.
    """
    parts = re.findall(r"[.0-9]+", split) if order == "modern" else split.split("," if "," in split else "/")
    try:
        shares = [float(part) for part in parts][:3]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ConfigError(
            f"Cannot read --split {split!r} as shares of training, validation and test documents",
            fix="Give one to three numbers of at least 0, not all 0, for example --split 949,50,1",
        )
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    first, second, third = (share / total for share in shares)
    return first, second, third


def split_bounds(split: str, size: int, order: Order) -> tuple[int, int, int, int]:
    """Return boundaries in sequences (0, a, b, size): training is [0, a), validation [a, b), test [b, size).

    The legacy order rounds each share and subtracts the error from every boundary but the first; the modern order
    rounds the running sum. At large sizes they differ by a sequence, which changes the order of all samples.
    """
    shares = parse_split(split, order)
    bounds = [0]
    if order == "modern":
        running = 0.0
        for share in shares:
            running += share
            bounds.append(round(running * float(size)))
    else:
        for share in shares:
            bounds.append(bounds[-1] + round(share * float(size)))
        excess = bounds[-1] - size
        bounds[1:] = [bound - excess for bound in bounds[1:]]
    return bounds[0], max(0, bounds[1]), max(0, bounds[2]), bounds[3]


def range_bounds(start: float, end: float, size: int) -> tuple[int, int]:
    """Return the first and last (exclusive) sequence of the range START:END of a weighted split."""
    return round(start * float(size)), round(end * float(size))
