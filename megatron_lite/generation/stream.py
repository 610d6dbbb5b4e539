"""Streaming detokenizer and stop strings: emits a character once all its bytes are generated."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.tokenizer.base import Tokenizer

UNFINISHED = "�"


class TextStream:
    """Decodes the tokens of one row incrementally; the returned pieces add up to the decoded text.

    A token may hold part of a character, and the leading space of a sentencepiece token depends on the token before.
    Therefore a short tail is decoded with and without the newest tokens, and the difference is returned.

    Args:
        tokenizer: tokenizer of the model.
        context: tokens before the first pushed one, whose text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = max(0, len(context) - 8)
        self._returned = len(context)

    def push(self, token: int) -> str:
        """Add a token; return the new text, empty while a character is incomplete."""
        self._ids.append(token)
        return self._new_text(complete_only=True)

    def flush(self) -> str:
        """Return the remaining text, with U+FFFD for an incomplete character."""
        return self._new_text(complete_only=False)

    def _new_text(self, complete_only: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._returned])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (complete_only and text.endswith(UNFINISHED)):
            return ""
        self._start, self._returned = self._returned, len(self._ids)
        return text[len(before) :]


class StopStrings:
    """Filter of streamed text that ends before the first stop string, whatever pieces the text comes in.

    Text in which a stop string may begin is held back. Of several stop strings the one that is complete first counts.

    Args:
        stops: not empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False
        """True once a stop string is complete: no more text is returned."""

    def push(self, piece: str) -> str:
        """Add text; return the text that certainly precedes any stop string."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text held back."""
        text, self._held = self._held, ""
        return text
