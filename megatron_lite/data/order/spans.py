"""Document boundaries within a sample: the token range of each document that makes up a part of it."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int, int]
"""(sequence of the file, offset in the sequence, number of tokens)."""


def take_spans(documents: Iterable[tuple[int, int]], offset: int, wanted: int) -> list[Span]:
    """Return the spans of the first `wanted` tokens of a stream of documents, or of all if there are fewer.

    Args:
        documents: number and length of each sequence of the stream, in order; no more are taken than needed.
        offset: first token in the first document.
        wanted: number of tokens.
    """
    spans = []
    for document, size in documents:
        length = min(wanted, size - offset)
        if length > 0:
            spans.append((document, offset, length))
            wanted -= length
            if not wanted:
                break
        offset = 0
    return spans
