"""Tokenizer interface: encoding of content, decoding, special tokens, fingerprints."""

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

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "<BOS>", "<|startoftext|>")
"""Names of beginning-of-text tokens, in the order in which they are tried."""


class TokenBatch(NamedTuple):
    """Several texts' tokens end to end: `ids` [tokens], and how many of them each text has, `lengths` [texts]."""

    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]


class Tokenizer(ABC):
    """Text to ids and back.

    Encoding yields the content of a text and nothing else: no beginning- or end-of-text token (whatever template the
    tokenizer's files hold), no truncation, no padding, no random segmentation; an empty text has no ids. Preprocessing
    and generation add `bos` and `eod` where a flag asks for them. A leading space or other normalization that the
    tokenizer's files ask for (add_prefix_space, add_dummy_prefix, lower case) is part of the content.

    A special token written out in a text (`<|endoftext|>`) is plain text to GPT-2's and sentencepiece's tokenizers,
    and becomes its id in those of Hugging Face, as in the libraries that both Megatrons use.
    """

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

    @property
    def bos(self) -> int:
        """Id of the beginning-of-text token (--prepend-bos).

        Raises:
            DataError: the vocabulary has none under any known name.
        """
        raise DataError(
            "--prepend-bos needs a tokenizer with a beginning-of-text token",
            found=f"{type(self).__name__} has none",
            fix="Leave --prepend-bos out",
        )

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the content of one text.

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

    def rules(self) -> str:
        """Hash of all that decides which ids a text gets, the rules of segmentation included.

        Preprocessing continues only work that was begun with the same rules; `fingerprint` compares vocabularies.
        """
        return self.fingerprint()

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of many texts end to end: the form that preprocessing writes. The same ids as `encode`."""
        encoded = [self.encode(text) for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter((token for one in encoded for token in one), np.uint32, int(lengths.sum()))
        return TokenBatch(ids, lengths)


def find_bos(vocabulary: dict[str, int], declared: str = "") -> int:
    """Id of the beginning-of-text token: the one `declared` by the tokenizer's files, else by name.

    Raises:
        DataError: there is none; the message names what was looked for.
    """
    names = ((declared,) if declared else ()) + BOS_NAMES
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        "--prepend-bos needs a tokenizer with a beginning-of-text token",
        found=f"the vocabulary of {len(vocabulary)} tokens has none of {', '.join(names)}",
        fix="Leave --prepend-bos out, or declare bos_token in tokenizer_config.json",
    )


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


def rules_hash(rules: bytes) -> str:
    """Hash of a tokenizer's serialized rules, as `sha256:<64 hex digits>`."""
    return f"sha256:{hashlib.sha256(rules).hexdigest()}"


def vocabulary_fingerprint(tokens: Iterable[tuple[int, str]]) -> str:
    """Hash over (id, token) in the order of ids, as `sha256:<64 hex digits>`.

    Ids keep their meaning as long as the vocabulary does, so how text is cut into them is left out: the same
    vocabulary read from vocab.json and from tokenizer.json has one fingerprint.
    """
    digest = hashlib.sha256()
    for token_id, token in sorted(tokens):
        digest.update(f"{token_id}\t{token}\n".encode("utf-8", "surrogatepass"))
    return f"sha256:{digest.hexdigest()}"
