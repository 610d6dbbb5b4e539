"""Train/validation/test split of a dataset, with Megatron's two rounding rules."""

from __future__ import annotations

import re
from typing import Literal

from megatron_lite.errors import ConfigError

Order = Literal["legacy", "modern"]


def parse_split(split: str, order: Order) -> tuple[float, float, float]:
    """Shares of training, validation and test, summing to 1, from Megatron's spellings ('949,50,1', '8/1/1', '1').

    Raises:
        ConfigError: the text holds something that is not a number, or nothing above 0.
    """
    words = re.findall(r"[.0-9]+", split) if order == "modern" else split.split("," if "," in split else "/")
    try:
        shares = [float(word) for word in words][:3]
    except ValueError:
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ConfigError(
            "--split gives the shares of training, validation and test documents",
            found=f"--split {split!r}",
            fix="Give up to three numbers, none negative and not all zero, as in --split 949,50,1",
        )
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    first, second, third = (share / total for share in shares)
    return first, second, third


def split_bounds(split: str, size: int, order: Order) -> tuple[int, int, int, int]:
    """Boundaries in sequences [0, a, b, size]: training is [0, a), validation [a, b), test [b, size).

    legacy rounds each share and takes the error off every boundary but the first; modern rounds the running sum. At
    large sizes they differ by a sequence, which is enough to change the order of everything.
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
    """Sequences [first, last) of the range START:END of a weighted split."""
    return round(start * float(size)), round(end * float(size))
