"""Tokenizer interface: encoding without special tokens, decoding, BOS and EOD tokens, fingerprints."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.errors import DataError

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eod>", "<|eod|>", "<EOD>", "<eos>", "<|eos|>")
"""Common names of the end-of-document token, in the order in which they are tried."""

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "<BOS>", "<|startoftext|>")
"""Common names of the beginning-of-text token, in the order in which they are tried."""


def describe_text(text: str) -> str:
    """Return the length and the beginning of a text, for errors."""
    return f"the text of {len(text):,} characters that begins with {text[:30]!r}"


class TokenBatch(NamedTuple):
    """Concatenated token ids of several texts, `ids` [tokens], and the number of tokens of each, `lengths` [texts]."""

    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, encoded: Sequence[npt.NDArray[np.uint32]]) -> TokenBatch:
        """Return the batch of the ids of each text."""
        ids = np.concatenate(encoded) if encoded else np.empty(0, np.uint32)
        return cls(ids, np.fromiter(map(len, encoded), np.int64, len(encoded)))


class Tokenizer(ABC):
    """Conversion between text and token ids.

    Encoding returns the content of a text only. It adds no beginning- or end-of-text token (templates in the
    tokenizer's files are ignored), and does not truncate, pad or segment at random; an empty text has no ids.
    Preprocessing and generation add `bos` and `eod` if a flag requires it. Normalization by the tokenizer's files
    (add_prefix_space, add_dummy_prefix, lower case) is part of the content.

    A special token in a text (`<|endoftext|>`) is plain text for GPT-2 and sentencepiece tokenizers, and is encoded as
    its id by Hugging Face tokenizers, as in the libraries that both Megatrons use.
    """

    unknown: int | None = None
    """Id of the unknown token; None if the vocabulary can represent every byte."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Largest id plus one (unpadded)."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """Id of the end-of-document token.

        Raises:
            DataError: the vocabulary has no token with a known name.
        """

    @property
    def bos(self) -> int:
        """Id of the beginning-of-text token (--prepend-bos).

        Raises:
            DataError: the vocabulary has no token with a known name.
        """
        raise DataError(
            f"{type(self).__name__} has no beginning-of-text token, which --prepend-bos adds",
            fix="Remove --prepend-bos, or use another --tokenizer-type",
        )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of one text.

        Raises:
            UnicodeEncodeError: the text contains half of a surrogate pair, which UTF-8 cannot represent.
            DataError: this tokenizer cannot encode the text: it is too long, or has characters without a token.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 (a split character) become U+FFFD."""

    @abstractmethod
    def token(self, token_id: int) -> str:
        """Return the vocabulary entry of an id, for display."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the vocabulary; equal exactly if two tokenizers can read each other's datasets."""

    def rules(self) -> str:
        """Return a hash of everything that determines the ids of a text, including the segmentation rules.

        Preprocessing continues interrupted work only with the same rules; `fingerprint` covers the vocabulary alone.
        """
        return self.fingerprint()

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Return the concatenated ids of many texts, equal to those of `encode`."""
        return TokenBatch.of([np.array(self.encode(text), np.uint32) for text in texts])

    def compare_encoders(self, texts: Sequence[str]) -> str:
        """Return the difference between the ids of a fast encoder and the library's for these texts; empty: none."""
        return ""


def find_bos(vocabulary: dict[str, int], declared: str = "") -> int:
    """Return the id of the beginning-of-text token.

    Args:
        vocabulary: ids by token.
        declared: name of the token in the tokenizer's files; empty: the common names are tried.

    Raises:
        DataError: the vocabulary has no such token.
    """
    names = ((declared,) if declared else ()) + BOS_NAMES
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        f"The tokenizer has no beginning-of-text token for --prepend-bos: its vocabulary of {len(vocabulary):,} "
        "tokens has "
        f"none of these: {', '.join(names)}",
        fix="Remove --prepend-bos, or declare the token as bos_token in tokenizer_config.json, in the folder of "
        "--tokenizer-type HuggingFaceTokenizer",
    )


def find_eod(vocabulary: dict[str, int], wanted: str, declared: str = "") -> int:
    """Return the id of the end-of-document token.

    Args:
        vocabulary: ids by token.
        wanted: name from --eod-token, if given.
        declared: name of the token in the tokenizer's files; empty: the common names are tried.

    Raises:
        DataError: the vocabulary has no such token.
    """
    names = (wanted,) if wanted else ((declared,) if declared else ()) + EOD_NAMES
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        f"The vocabulary of {len(vocabulary):,} tokens has no token {wanted} (--eod-token {wanted})"
        if wanted
        else f"The tokenizer's end-of-document token is unknown: its vocabulary of {len(vocabulary):,} tokens has "
        "none of "
        f"the usual names ({', '.join(names)})",
        fix="Give --eod-token the name of the vocabulary's end-of-document token",
    )


def rules_hash(rules: bytes) -> str:
    """Return a hash of a tokenizer's serialized rules, as `sha256:<64 hex digits>`."""
    return f"sha256:{hashlib.sha256(rules).hexdigest()}"


def vocabulary_fingerprint(tokens: Iterable[tuple[int, str]]) -> str:
    """Return a hash over (id, token) in the order of ids, as `sha256:<64 hex digits>`.

    Segmentation rules are not included: the same vocabulary read from vocab.json and from tokenizer.json has the same
    fingerprint.
    """
    lines = "".join(f"{token_id}\t{token}\n" for token_id, token in sorted(tokens))
    return rules_hash(lines.encode("utf-8", "surrogatepass"))
