"""Dataset statistics: histogram of sequence lengths as text and SVG, and a check of all token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_lite.data.format.index_format import bin_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.serving.dataset import check_tokens

CHUNK = 1 << 20
CHECKED_TOKENS = 1 << 25
"""Tokens checked at a time."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the sequences of a dataset, in tokens.

    Attributes:
        shortest, longest, mean: of all sequences; 0 if there are none.
        empty: number of sequences without a token.
        counts: [buckets] number of sequences with 2^b <= length < 2^(b+1), without empty ones.
        tokens: [buckets] number of tokens of these sequences.
    """

    shortest: int
    longest: int
    mean: float
    empty: int
    counts: NDArray[np.int64]
    tokens: NDArray[np.int64]


def survey_lengths(data: IndexedDataset) -> Lengths:
    """Return the length statistics of all sequences."""
    counts, tokens = np.zeros(31, dtype=np.int64), np.zeros(31, dtype=np.int64)
    empty, shortest, longest = 0, 2**31, 0
    for low in range(0, len(data), CHUNK):
        sizes = data.sizes[low : low + CHUNK].astype(np.int64)
        shortest, longest = min(shortest, int(sizes.min())), max(longest, int(sizes.max()))
        filled = sizes[sizes > 0]
        empty += sizes.shape[0] - filled.shape[0]
        bucket = np.frexp(filled.astype(np.float64))[1] - 1
        counts += np.bincount(bucket, minlength=31)
        tokens += np.bincount(bucket, weights=filled, minlength=31).astype(np.int64)
    if not len(data):
        return Lengths(0, 0, 0.0, 0, counts, tokens)
    return Lengths(shortest, longest, data.num_tokens / len(data), empty, counts, tokens)


def draw_lengths(lengths: Lengths, columns: int = 80) -> list[str]:
    """Return the histogram as lines of text: a bar for each power of two, with shares of sequences and tokens."""
    used = np.flatnonzero(lengths.counts)
    if not used.size:
        return ["  no tokens"]
    buckets = range(int(used[0]), int(used[-1]) + 1)
    ranges = [f"{2**bucket:,} to {2 ** (bucket + 1) - 1:,}" for bucket in buckets]
    numbers = [f"{lengths.counts[bucket]:,}" for bucket in buckets]
    left, right = max(len("tokens"), *map(len, ranges)), max(len("sequences"), *map(len, numbers))
    width = max(8, columns - left - right - len("    of all  of tokens") - 2)
    lines = [f"  {'tokens':>{left}}  {'':{width}} {'sequences':>{right}} {'of all':>6} {'of tokens':>9}"]
    most, all_counts, all_tokens = lengths.counts.max(), lengths.counts.sum() + lengths.empty, lengths.tokens.sum()
    for bucket, span, number in zip(buckets, ranges, numbers, strict=True):
        count = int(lengths.counts[bucket])
        eighths = round(count / int(most) * width * 8)
        bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
        lines.append(
            f"  {span:>{left}}  {bar:<{width}} {number:>{right}} "
            f"{count / all_counts:>6.1%} {lengths.tokens[bucket] / all_tokens:>9.1%}"
        )
    return lines


def draw_lengths_svg(lengths: Lengths, title: str) -> str:
    """Return the histogram as an SVG: for each power of two, bars for the shares of sequences and of tokens."""
    used = np.flatnonzero(lengths.counts)
    buckets = range(int(used[0]), int(used[-1]) + 1) if used.size else range(0)
    width, height = 60 + 44 * len(buckets), 300
    shares = {
        "#4c78a8": lengths.counts / max(1, lengths.counts.sum()),
        "#f58518": lengths.tokens / max(1, lengths.tokens.sum()),
    }
    top = max((float(share.max()) for share in shares.values()), default=1.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18">{_escaped(title)}: share of <tspan fill="#4c78a8">sequences</tspan> and of '
        f'<tspan fill="#f58518">tokens</tspan> by length</text>',
    ]
    for column, bucket in enumerate(buckets):
        left = 30 + 44 * column
        for side, (colour, share) in enumerate(shares.items()):
            tall = 220 * float(share[bucket]) / top
            x, y = left + 18 * side, 260 - tall
            parts.append(f'<rect x="{x}" y="{y:.1f}" width="17" height="{tall:.1f}" fill="{colour}"/>')
            parts.append(
                f'<text x="{x + 8}" y="{y - 3:.1f}" text-anchor="middle" font-size="8">{share[bucket]:.0%}</text>'
            )
        parts.append(f'<text x="{left + 17}" y="276" text-anchor="middle">{_short(2**bucket)}</text>')
    return "\n".join([*parts, f'<text x="{width / 2}" y="294" text-anchor="middle">tokens, from</text>', "</svg>", ""])


def check_all_tokens(data: IndexedDataset, vocab_size: int) -> Iterator[int]:
    """Check every token id of the .bin against the vocabulary, and yield the number of tokens checked so far.

    Raises:
        DataError: an id is outside the vocabulary; the message names its position.
    """
    itemsize, done = data.dtype.itemsize, 0
    with bin_path(data.prefix).open("rb") as file:
        while content := file.read(CHECKED_TOKENS * itemsize):
            tokens = np.frombuffer(content, dtype=data.dtype)
            if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
                values = tokens.astype(np.int64)
                at = done + int(np.flatnonzero((values < 0) | (values >= vocab_size))[0])
                sequence = int(np.searchsorted(data.pointers, at * itemsize, side="right")) - 1
                check_tokens(data.prefix, tokens, vocab_size, f"sequence {sequence}, token {at} of the file")
            done += tokens.shape[0]
            yield done


def _short(number: int) -> str:
    return f"{number >> 20}M" if number >= 1 << 20 else f"{number >> 10}K" if number >= 1 << 10 else str(number)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
