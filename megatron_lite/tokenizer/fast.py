"""tiktoken fast path for GPT-2's byte-level BPE, with ids identical to Hugging Face's tokenizers.

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
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import TokenBatch
from megatron_lite.tokenizer.words import MAX_PIECE, PATTERN, overlaps, pieces

if TYPE_CHECKING:
    import tiktoken

Ids = npt.NDArray[np.uint32]
GROUP = 1 << 20
"""Characters of text that are encoded in one call, so that a large document needs little memory besides itself."""

MAX_WHOLE = 1 << 23
"""Characters of the longest text that is encoded whole where no place to cut it is known: that takes 50 to 90 bytes a
character."""


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted: `Ġ` → 32."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


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
        self._num_bytes = np.zeros(self._marker_id, np.int64)
        self._num_bytes[list(ranks.values())] = list(map(len, ranks))

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of texts of any length.

        Raises:
            UnicodeEncodeError: a text holds half of a surrogate pair.
            DataError: a text is longer than MAX_WHOLE, and there is no place where it may be cut.
        """
        ids, lengths = [np.empty(0, np.uint32)], np.zeros(len(texts), np.int64)
        for group in _groups(texts):
            batch = self._encode_group([piece for _, piece in group])
            ids.append(batch.ids)
            np.add.at(lengths, [text for text, _ in group], batch.lengths)
        return TokenBatch(np.concatenate(ids), lengths)

    def encode(self, text: str) -> list[int]:
        """Ids of one text; raises as `encode_flat`."""
        if len(text) > MAX_PIECE:
            return self.encode_flat([text]).ids.tolist()
        text.encode("utf-8")
        return self._library.encode_ordinary(text)

    def _encode_group(self, group: Sequence[str]) -> TokenBatch:
        """Ids of short pieces, or of a long one that stands alone."""
        if len(group[0]) > MAX_PIECE:
            encoded = [self._encode_long(group[0])]
            return TokenBatch(encoded[0], np.array([len(encoded[0])]))
        joined = self._marker.join(group)
        if joined.count(self._marker) != len(group) - 1:  # a text that holds the marker: nobody's, but it must not lie
            encoded = [self._encode_whole(text) for text in group]
            return TokenBatch(np.concatenate(encoded), np.fromiter(map(len, encoded), np.int64, len(encoded)))
        marked = self._encode_whole(joined, self._allowed)
        ends = np.append(np.flatnonzero(marked == self._marker_id), len(marked))
        lengths = np.diff(ends, prepend=-1) - 1
        return TokenBatch(marked[marked != self._marker_id], lengths)

    def _encode_whole(self, text: str, special: AbstractSet[str] = frozenset()) -> Ids:
        text.encode("utf-8")
        if len(text) > MAX_WHOLE:
            raise _too_long(text)
        try:
            return self._library.encode_to_numpy(text, allowed_special=special, disallowed_special=())
        except ValueError as error:  # the regex engine's stack is full
            raise _too_long(text) from error

    def _encode_long(self, text: str) -> Ids:
        """Ids of a text without a sure end of a word, stitched together from stretches of it that overlap.

        Tokens are a text's BPE exactly if each two neighbours are the BPE of what they spell (rust-gems' `bpe`, for
        vocabularies such as `build` lets pass). So where the encodings of two overlapping stretches of one word share
        a token, the first up to it and the second from it on are the encoding of both together.
        """
        places = list(overlaps(text))
        stops = [end for _, end in places] + [len(text)]
        done, left = list[Ids](), self._encode_whole(text[: stops[0]])
        for (begin, end), stop in zip(places, stops[1:], strict=True):
            shared = text[begin:end].encode()
            shared = shared[self._first_edge(left, shared) :]
            right = self._encode_whole(shared.decode() + text[end:stop])
            meeting = self._meeting(left, right, len(shared))
            if meeting is None:
                return self._encode_whole(text)
            done.append(left[: meeting[0]])
            left = right[meeting[1] :]
        return np.concatenate([*done, left])

    def _first_edge(self, left: Ids, shared: bytes) -> int:
        """Where in `shared`, the end of what `left` spells, a token begins: a pattern that repeats keeps its step."""
        sizes = self._num_bytes[left[-len(shared) :]]
        edges = len(shared) - np.cumsum(sizes[::-1])[::-1]
        return next((at for at in edges.tolist() if at >= 0 and shared[at] & 0xC0 != 0x80), 0)

    def _meeting(self, left: Ids, right: Ids, shared: int) -> tuple[int, int] | None:
        """Indices of a token that both have at one place in the `shared` bytes at left's end and right's beginning."""
        before, after = self._num_bytes[left[-shared:]], self._num_bytes[right[:shared]]
        ends = shared - int(before.sum()) + np.cumsum(before)
        _, i, j = np.intersect1d(ends, np.cumsum(after), assume_unique=True, return_indices=True)
        same = np.flatnonzero(before[i] == after[j])
        return (len(left) - len(before) + int(i[same[0]]), int(j[same[0]])) if len(same) else None


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """The texts' pieces, each with the number of its text, in groups of about GROUP; a long piece stands alone."""
    group, size = list[tuple[int, str]](), 0
    for number, text in enumerate(texts):
        for piece in pieces(text):
            if group and (size + len(piece) > GROUP or len(piece) > MAX_PIECE or len(group[0][1]) > MAX_PIECE):
                yield group
                group, size = [], 0
            group.append((number, piece))
            size += len(piece)
    if group:
        yield group


def _too_long(text: str) -> DataError:
    return DataError(
        "A long text has places where it may be cut",
        found=f"{len(text):,} characters in one word (at most {MAX_WHOLE:,})",
        fix="Leave it out, or cut it",
    )
