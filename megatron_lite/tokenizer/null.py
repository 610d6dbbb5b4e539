"""Null tokenizer: text of decimal numbers, which are the token ids; for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.errors import ConfigError, DataError
from megatron_lite.tokenizer.base import Tokenizer

MAX_DIGITS = 4000
"""Maximum digits of a number with leading zeros; int() accepts at most 4,300."""


class NullTokenizer(Tokenizer):
    """Tokenizer of ids 0 … size−1 as decimal numbers separated by whitespace; id `size` ends a document."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(
                f"--tokenizer-type NullTokenizer has --vocab-size {size}",
                fix="Give --vocab-size N, the number of token ids of the data, at least 1",
            )
        self._size = size

    @property
    def vocab_size(self) -> int:
        """`size` numbers and the end-of-document token."""
        return self._size + 1

    @property
    def eod(self) -> int:
        """The first id after the numbers."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """Return the numbers in a text.

        Raises:
            DataError: a word is not a number of the vocabulary.
        """
        words = text.split()
        bad = next((word for word in words if not self._is_token(word)), None)
        if bad is None:
            return [int(word) for word in words]
        number = bad.isascii() and bad.isdigit()
        raise DataError(
            f"NullTokenizer cannot encode {bad[:40]!r}: it reads token ids from 0 to {self._size}, separated by spaces "
            f"(--vocab-size {self._size})",
            fix="Use a larger --vocab-size, or ids within it"
            if number
            else "Write token ids instead of text, or use another --tokenizer-type",
        )

    def _is_token(self, word: str) -> bool:
        return word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS and int(word) < self.vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        """Return the numbers, separated by spaces."""
        return " ".join(map(str, ids))

    def token(self, token_id: int) -> str:
        """Return the number."""
        return str(token_id)

    def fingerprint(self) -> str:
        """Return the size, which determines the vocabulary."""
        return f"null:{self._size}"
