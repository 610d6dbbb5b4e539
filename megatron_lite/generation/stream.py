"""Streaming detokenizer: emits a character once all its bytes are generated."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.tokenizer.base import Tokenizer

UNFINISHED = "�"


class TextStream:
    """Turns one row's tokens into pieces of text that, joined, are the decoded whole.

    A token may hold a part of a character, and a sentencepiece token's leading space depends on what stands before it.
    So a short tail is decoded with and without the newest tokens, and the difference is told.

    Args:
        tokenizer: decodes.
        context: the tokens before the first pushed one; they are not told.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = max(0, len(context) - 8)
        self._told = len(context)

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; empty while a character is incomplete."""
        self._ids.append(token)
        return self._tell(complete_only=True)

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that never became whole."""
        return self._tell(complete_only=False)

    def _tell(self, complete_only: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._told])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (complete_only and text.endswith(UNFINISHED)):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return text[len(before) :]
