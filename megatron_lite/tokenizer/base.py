"""What every tokenizer offers, whatever library is behind it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.errors import DataError

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eod>", "<|eod|>", "<EOD>", "<eos>", "<|eos|>")
"""Names under which tokenizers keep their end-of-document token, in the order in which they are tried."""


class TokenBatch(NamedTuple):
    """Several texts' tokens end to end: `ids` [tokens], and how many of them each text has, `lengths` [texts]."""

    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]


class Tokenizer(ABC):
    """Text to ids and back. Encoding never adds the end-of-document token: who wants one appends `eod`."""

    unknown: int | None = None
    """Id that stands for text the vocabulary cannot spell; None where every byte can be spelled."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id (unpadded)."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id of the end-of-document token.

        Raises:
            DataError: the vocabulary has none under any known name.
        """

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of one text.

        Raises:
            UnicodeEncodeError: the text holds half of a surrogate pair, which no UTF-8 spells.
            DataError: this tokenizer cannot encode the text: it is too long, or holds what is no token.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """One id as its vocabulary spells it, for people to read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of what each id means; equal exactly when two tokenizers may read each other's datasets."""

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of many texts end to end: the form that preprocessing writes. The same ids as `encode`."""
        encoded = [self.encode(text) for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter((token for one in encoded for token in one), np.uint32, int(lengths.sum()))
        return TokenBatch(ids, lengths)


def find_eod(vocabulary: dict[str, int], wanted: str, declared: str = "") -> int:
    """Id of the end-of-document token: `wanted` (--eod-token), else `declared` by the tokenizer's files, else by name.

    Raises:
        DataError: there is none; the message names what was looked for.
    """
    names = (wanted,) if wanted else ((declared,) if declared else ()) + EOD_NAMES
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        "A tokenizer needs an end-of-document token",
        found=f"the vocabulary of {len(vocabulary)} tokens has none of {', '.join(names)}",
        fix="Name the token that ends a document with --eod-token",
    )


def vocabulary_fingerprint(tokens: Iterable[tuple[int, str]]) -> str:
    """Hash over (id, token) in the order of ids, as `sha256:<64 hex digits>`.

    Ids keep their meaning as long as the vocabulary does, so how text is cut into them is left out: the same
    vocabulary read from vocab.json and from tokenizer.json has one fingerprint.
    """
    digest = hashlib.sha256()
    for token_id, token in sorted(tokens):
        digest.update(f"{token_id}\t{token}\n".encode("utf-8", "surrogatepass"))
    return f"sha256:{digest.hexdigest()}"
