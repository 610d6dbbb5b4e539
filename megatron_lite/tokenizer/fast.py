"""GPT-2's byte-level BPE through tiktoken, where that provably gives the ids of Hugging Face's `tokenizers`.

Both cut text with the same regular expression and then merge within each word. `tokenizers` merges the pairs that
merges.txt lists, by their order; tiktoken merges whatever pair spells a token, by that token's id. They agree if
every token is a byte or has exactly one merge, ids grow in the order of merges, and every token's own bytes merge
back to it: a state of BPE is fixed by its bytes, so no other pair that spells the token can ever stand side by side
(the argument of Berglund & van der Merwe, "Formalizing BPE Tokenization", for the rules up to each merge).
`build` checks these conditions and refuses otherwise; tests compare ids over all of Unicode.
"""

from __future__ import annotations

import importlib.util
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_lite.tokenizer.base import TokenBatch

if TYPE_CHECKING:
    import tiktoken

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_PIECE = 50_000
"""Characters handed over at once: the regex engine behind tiktoken overflows its stack on a blank run of a million."""

LETTERS = "A-Za-z\\u3041-\\u3096\\u30a1-\\u30fa\\u4e00-\\u9fa5\\uac00-\\ud7a3"
SIGNS = "\\u2026\\u201c\\u201d\\u3001-\\u3003\\u300c\\u300d\\uff01\\uff0c\\uff1a\\uff1b\\uff1f"
CUT = re.compile(
    f"(?<=[{LETTERS}])(?=[\\x00-@\\[-`{{-\\x7f{SIGNS}])|(?<=[0-9])(?=[\\x00-/:-\\x7f{SIGNS}])|(?<=\\S)(?= )"
)
"""Places where a word of PATTERN surely ends, whatever stands around: after a letter before what is no letter, after a
digit before what is no digit, and after anything before a blank. Only characters whose class is beyond doubt."""


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted: `Ġ` → 32."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def pieces(text: str, limit: int = MAX_PIECE) -> Iterator[str]:
    """Cut a text where GPT-2's pattern cuts it anyway, so that the pieces' ids end to end are the text's.

    A piece is longer than `limit` only where there is no such place for long: a run of blanks, or of characters of
    one class.
    """
    start = 0
    while len(text) - start > limit:
        place = CUT.search(text, start + (limit + 1) // 2)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def build(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], reaches_itself: Callable[[str], bool]
) -> FastByteBpe | None:
    """The fast encoder, or None where tiktoken is not installed or could give other ids.

    Args:
        vocabulary: symbols of tokens to ids; those that are neither a byte nor a merge's are never encoded.
        merges: the pairs of merges.txt, in order.
        reaches_itself: whether BPE turns a token's symbols back into that one token.
    """
    if importlib.util.find_spec("tiktoken") is None:
        return None
    symbols = byte_of_symbol()
    merged = [left + right for left, right in merges]
    ids = [vocabulary.get(token, -1) for token in merged]
    rank = dict.fromkeys(symbols, -1) | {token: i for i, token in enumerate(merged)}
    proper = (
        vocabulary.keys() >= rank.keys()
        and len(rank) == len(symbols) + len(merges)
        and all(itertools.starmap(operator.lt, itertools.pairwise(ids)))
        and max((vocabulary[symbol] for symbol in symbols), default=0) < min(ids, default=1 << 31)
        and all(rank.get(a, 1 << 31) < i and rank.get(b, 1 << 31) < i for i, (a, b) in enumerate(merges))
        and all(map(reaches_itself, merged))
    )
    if not proper:
        return None
    bytes_of = str.maketrans({symbol: chr(byte) for symbol, byte in symbols.items()})
    return FastByteBpe({token.translate(bytes_of).encode("latin-1"): vocabulary[token] for token in rank})


class FastByteBpe:
    """Encodes many texts in one call: they are joined by a marker that tiktoken cuts at and numbers for us."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._marker_id = max(ranks.values()) + 1
        self._marker = "\x00\x01<|megatron_lite: next text|>\x01\x00"
        self._library: tiktoken.Encoding = tiktoken.Encoding(
            "megatron_lite", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={self._marker: self._marker_id}
        )
        self._allowed = {self._marker}

    @staticmethod
    def takes(text: str) -> bool:
        """Whether this (piece of) text is short enough for the regex engine."""
        return len(text) <= MAX_PIECE

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of texts that `takes` accepts.

        Raises:
            UnicodeEncodeError: a text holds half of a surrogate pair.
        """
        if not texts:
            return TokenBatch(np.empty(0, np.uint32), np.empty(0, np.int64))
        joined = self._marker.join(texts)
        if joined.count(self._marker) != len(texts) - 1:  # a text that holds the marker: nobody's, but it must not lie
            encoded = [np.asarray(self._library.encode_ordinary(text), np.uint32) for text in texts]
            return TokenBatch(np.concatenate(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded)))
        joined.encode("utf-8")
        marked = self._library.encode_to_numpy(joined, allowed_special=self._allowed, disallowed_special=())
        ends = np.append(np.flatnonzero(marked == self._marker_id), len(marked))
        lengths = np.diff(ends, prepend=-1) - 1
        return TokenBatch(marked[marked != self._marker_id], lengths)

    def encode(self, text: str) -> list[int]:
        """Ids of one text that `takes` accepts."""
        text.encode("utf-8")
        return self._library.encode_ordinary(text)
