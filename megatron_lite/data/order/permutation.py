"""Keyed permutation: a Feistel network with cycle walking, which maps one index at a time without a table.

The network permutes [0, 2^bits), the smallest such range that holds the indices; a result outside [0, size) is mapped
again until it is inside, in fewer than two steps on average (more below 32 indices). Both are from Black & Rogaway,
"Ciphers with Arbitrary Finite Domains" (CT-RSA 2002). The round function is the 64-bit finalizer of SplitMix64 (Steele,
Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). It makes a good shuffle, not a secret one.
"""

from __future__ import annotations

import hashlib
import struct

ROUNDS = 8
"""Rounds of the network; an even number, after which both halves have their first widths again."""

MIN_BITS = 6
"""Smallest network: on fewer bits, eight rounds do not make all orders equally frequent (of 5 samples, on 4 bits)."""

KEYS = struct.Struct(f"<{ROUNDS}Q")
MASK = 2**64 - 1


def round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Return the keys of the rounds for one epoch of a run, [ROUNDS] numbers of 64 bits."""
    return KEYS.unpack(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=KEYS.size).digest())


def permute(index: int, size: int, keys: tuple[int, ...]) -> int:
    """Return the image of `index` under the permutation of [0, size) that `keys` select."""
    bits = max(MIN_BITS, (size - 1).bit_length())
    narrow, wide = bits // 2, bits - bits // 2
    low, high = (1 << narrow) - 1, (1 << wide) - 1
    while True:
        left, right = index >> narrow, index & low  # `wide` and `narrow` bits
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            left ^= _mix(right, even) & high
            right ^= _mix(left, odd) & low
        index = left << narrow | right
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    """Return 64 bits that depend on all bits of `value` and `key`."""
    mixed = (value * 0x9E3779B97F4A7C15 + key) & MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
    return mixed ^ mixed >> 31
