"""Fast encoder of GPT-2's byte-level BPE with tiktoken, and safe split points of long texts.

tiktoken and Hugging Face's `tokenizers` split text with the same regular expression (PATTERN) and then merge within
each word. `tokenizers` merges the pairs of merges.txt in their order; tiktoken merges any pair that forms a token, in
the order of token ids. Both give the same ids if every token is a byte or has exactly one merge, ids increase in the
order of merges, and the bytes of every token merge to this token: a state of BPE is determined by its bytes, so no
other pair that forms the token can ever be adjacent (the argument of Berglund & van der Merwe, "Formalizing BPE
Tokenization", for the rules up to each merge). The fast encoder is used only under these conditions, which `build` and
`build_for` check; tests compare ids over all of Unicode.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import operator
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import TokenBatch, describe_text

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

Ids = npt.NDArray[np.uint32]
GROUP = 1 << 20
"""Characters encoded in one call, which bounds memory."""

MAX_WHOLE = 1 << 23
"""Maximum characters of a text without split points, which is encoded in one call (50 to 90 bytes of memory each)."""

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_PIECE = 50_000
"""Characters passed to tiktoken at once: its regex engine overflows the stack on a million whitespace characters."""

LETTERS = (
    "A-Za-z\\u00c0-\\u00d6\\u00d8-\\u00f6\\u00f8-\\u017f\\u0391-\\u03a1\\u03a3-\\u03a9\\u03b1-\\u03c9\\u0410-\\u044f"
    "\\u05d0-\\u05ea\\u0621-\\u063a\\u0641-\\u064a\\u3041-\\u3096\\u30a1-\\u30fa\\u4e00-\\u9fa5\\uac00-\\ud7a3"
)
SIGNS = "\\u2026\\u201c\\u201d\\u3001-\\u3003\\u300c\\u300d\\uff01\\uff0c\\uff1a\\uff1b\\uff1f"
CUT = re.compile(
    f"(?<=[{LETTERS}])(?=[\\x00-@\\[-`{{-\\x7f{SIGNS}])|(?<=[0-9])(?=[\\x00-/:-\\x7f{SIGNS}])|(?<=\\S)(?= )"
)
"""Positions where a match of PATTERN ends in every context: between a letter and a character that is not a letter,
between a digit and a character that is not a digit, and before a space. Only characters whose Unicode class is the same
in all versions of the libraries."""

OVERLAP = 1024
MARGIN = 16
_LENGTH = OVERLAP + 2 * MARGIN
_RUN = re.compile("|".join(f"[{kind}]{{{_LENGTH}}}" for kind in (LETTERS, "0-9", "!-/:-@\\[-`{-~", " \\t\\n\\r")))


def byte_of_symbol() -> dict[str, int]:
    """Return the byte of each printable character in GPT-2's vocabulary files: `Ġ` → 32."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def build_for(library: tokenizers.Tokenizer) -> FastByteBpe | None:
    """Return the tiktoken encoder of a byte-level BPE like GPT-2's; None for other tokenizers."""
    import tokenizers as hf

    if not isinstance(library.model, hf.models.BPE):
        return None
    spec: dict[str, Any] = json.loads(library.to_str())
    model, cutter = spec["model"], spec["pre_tokenizer"]
    plain_model = not any(
        model.get(key) for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    byte_level = (
        cutter is not None
        and cutter["type"] == "ByteLevel"
        and not cutter["add_prefix_space"]
        and cutter.get("use_regex", True)
    )
    if not (plain_model and byte_level and spec["normalizer"] is None):
        return None
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    if not all(len(library.model.tokenize(left + right)) == 1 for left, right in merges):
        return None
    return build(model["vocab"], merges)


def build(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]) -> FastByteBpe | None:
    """Return the fast encoder; None if tiktoken is not installed or could give other ids.

    Args:
        vocabulary: ids by token, in GPT-2's printable form; tokens that are neither a byte nor a merge are never used.
        merges: pairs of merges.txt, in order. The bytes of each merged token must merge to this token.
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
    )
    if not proper:
        return None
    bytes_of = str.maketrans({symbol: chr(byte) for symbol, byte in symbols.items()})
    return FastByteBpe({token.translate(bytes_of).encode("latin-1"): vocabulary[token] for token in rank})


class FastByteBpe:
    """Encoder of many texts in one call of tiktoken: a special token joins the texts, and the ids are split at it."""

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
        """Return the concatenated ids of texts of any length.

        Raises:
            UnicodeEncodeError: a text contains half of a surrogate pair.
            DataError: a text is longer than MAX_WHOLE and has no split point.
        """
        ids, lengths = [np.empty(0, np.uint32)], np.zeros(len(texts), np.int64)
        for group in _groups(texts):
            batch = self._encode_group([piece for _, piece in group])
            ids.append(batch.ids)
            np.add.at(lengths, [text for text, _ in group], batch.lengths)
        return TokenBatch(np.concatenate(ids), lengths)

    @staticmethod
    def is_uncertain(text: str) -> bool:
        """Return False: both libraries classify all characters alike."""
        return False

    def _encode_group(self, group: Sequence[str]) -> TokenBatch:
        """Return the ids of a group of short pieces, or of a single long one."""
        if len(group[0]) > MAX_PIECE:
            encoded = [self._encode_long(group[0])]
            return TokenBatch(encoded[0], np.array([len(encoded[0])]))
        joined = self._marker.join(group)
        if joined.count(self._marker) != len(group) - 1:  # a text contains the marker
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
        """Return the ids of a text without split points, joined from overlapping spans.

        Tokens are the BPE of a text exactly if each two adjacent tokens are the BPE of their bytes (see the crate `bpe`
        of rust-gems; it holds for vocabularies that `build` accepts). So if the encodings of two overlapping spans of a
        word share a token, the first encoding up to it and the second one from it on form the encoding of both.
        """
        spans = list(overlaps(text))
        stops = [end for _, end in spans] + [len(text)]
        done, left = list[Ids](), self._encode_whole(text[: stops[0]])
        for (begin, end), stop in zip(spans, stops[1:], strict=True):
            shared = text[begin:end].encode()
            shared = shared[self._first_edge(left, shared) :]
            right = self._encode_whole(shared.decode() + text[end:stop])
            common = self._common_token(left, right, len(shared))
            if common is None:
                return self._encode_whole(text)
            done.append(left[: common[0]])
            left = right[common[1] :]
        return np.concatenate([*done, left])

    def _first_edge(self, left: Ids, shared: bytes) -> int:
        """Return the first token boundary of `left` within its last bytes `shared`, which aligns repetitions."""
        sizes = self._num_bytes[left[-len(shared) :]]
        edges = len(shared) - np.cumsum(sizes[::-1])[::-1]
        return next((at for at in edges.tolist() if at >= 0 and shared[at] & 0xC0 != 0x80), 0)

    def _common_token(self, left: Ids, right: Ids, shared: int) -> tuple[int, int] | None:
        """Return the indices of a common token at the same position of the `shared` bytes; None if there is none."""
        before, after = self._num_bytes[left[-shared:]], self._num_bytes[right[:shared]]
        ends = shared - int(before.sum()) + np.cumsum(before)
        _, i, j = np.intersect1d(ends, np.cumsum(after), assume_unique=True, return_indices=True)
        same = np.flatnonzero(before[i] == after[j])
        return (len(left) - len(before) + int(i[same[0]]), int(j[same[0]])) if len(same) else None


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield groups of GROUP characters of (number of the text, piece); a long piece has a group of its own."""
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
        f"Cannot encode {describe_text(text)}: in more than {MAX_WHOLE:,} characters in a row, the tokenizer finds no "
        "place to split it (all are letters, or all spaces, for example)",
        fix="Break this run, letters by a space and spaces by a letter, or remove the text from the input",
    )


def pieces(text: str, limit: int = MAX_PIECE) -> Iterator[str]:
    """Split a text at positions where PATTERN splits it, so that the concatenated ids of the pieces are the text's.

    A piece is longer than `limit` only if there is no such position: in a long run of whitespace or of characters of
    one class.
    """
    start = 0
    while len(text) - start > limit:
        found = CUT.search(text, start + (limit + 1) // 2)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def overlaps(text: str, limit: int = MAX_PIECE) -> Iterator[tuple[int, int]]:
    """Yield spans [begin, end) of OVERLAP characters inside runs of one class, at least `limit` characters apart.

    PATTERN matches one word that covers the whole span and ends with the run (for whitespace: with its last character),
    also if matching starts anywhere in the span; the word begins at the same position if the text ends with the span.
    MARGIN excludes the ends of a run, where contractions ('s) and the space before a word matter.
    """
    position = limit
    while position < len(text):
        found = _RUN.match(text, position)
        if found is None:
            position += _LENGTH
            continue
        yield position + MARGIN, position + MARGIN + OVERLAP
        position += _LENGTH + limit
