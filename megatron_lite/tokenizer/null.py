"""Null tokenizer: text of decimal numbers, whose values are the ids; for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.errors import ConfigError, DataError
from megatron_lite.tokenizer.base import Tokenizer

MAX_DIGITS = 4000
"""Digits of a number with leading zeros; int() refuses more than 4,300."""


class NullTokenizer(Tokenizer):
    """Ids 0 … size−1 written in decimal and separated by blanks; the end of a document is id `size`."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(
                "NullTokenizer needs a vocabulary size",
                found=f"--vocab-size is {size}",
                fix="Give --vocab-size N, N ≥ 1",
            )
        self._size = size

    @property
    def vocab_size(self) -> int:
        """`size` numbers and the end of a document."""
        return self._size + 1

    @property
    def eod(self) -> int:
        """The first id after the numbers."""
        return self._size

    def encode(self, text: str) -> list[int]:
        """The numbers in the text.

        Raises:
            DataError: a word is not a number of the vocabulary.
        """
        words = text.split()
        bad = next((word for word in words if not self._is_token(word)), None)
        if bad is None:
            return [int(word) for word in words]
        raise DataError(
            "NullTokenizer reads numbers separated by blanks",
            found=f"{bad[:40]!r} is not a number below {self.vocab_size}",
            fix="Give text of numbers, a larger --vocab-size, or another --tokenizer-type",
        )

    def _is_token(self, word: str) -> bool:
        return word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS and int(word) < self.vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, separated by blanks."""
        return " ".join(map(str, ids))

    def token(self, token_id: int) -> str:
        """The number itself."""
        return str(token_id)

    def fingerprint(self) -> str:
        """Says the size: numbers mean themselves."""
        return f"null:{self._size}"
