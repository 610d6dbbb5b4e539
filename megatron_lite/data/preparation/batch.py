"""Tokenized document batch: tokenizes documents, adds BOS and EOD, filters, counts outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.data.preparation.report import Example, UnitReport
from megatron_lite.tokenizer.base import TokenBatch

WINDOW = 4096
REPETITIVE_BELOW = 0.02
"""A document is repetitive if WINDOW tokens in its middle have fewer distinct tokens than this share."""

FEW = 1024
"""Tokens of the window that are counted first."""

UNKNOWN_ABOVE = 0.05
"""Share of unknown tokens above which a document is reported."""


@dataclass(frozen=True)
class Batch:
    """Concatenated documents of one or more sequences.

    Attributes:
        ids: [tokens] token ids.
        lengths: [sequences] tokens of each sequence, at least 1.
        sequences: [documents] sequences of each document, 0 for an empty one.
        answers: [tokens] loss mask; None: the documents are no prompts with answers.
    """

    ids: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    answers: npt.NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, encoded: TokenBatch, sequences: npt.NDArray[np.int64]) -> Batch:
        """Return the batch of documents of `sequences` encoded texts each; texts without tokens are left out."""
        filled = encoded.lengths > 0
        if filled.all():
            return cls(encoded.ids, encoded.lengths, sequences)
        document = np.repeat(np.arange(len(sequences)), sequences)
        return cls(encoded.ids, encoded.lengths[filled], np.bincount(document[filled], minlength=len(sequences)))

    @property
    def document_tokens(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each document, [documents]."""
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        last = np.cumsum(self.sequences)
        return ends[last] - ends[last - self.sequences]

    def keep(self, documents: npt.NDArray[np.bool_]) -> Batch:
        """Return the batch of the documents of a mask, [documents]."""
        if documents.all():
            return self
        sequences = np.repeat(documents, self.sequences)
        tokens = np.repeat(sequences, self.lengths)
        answers = None if self.answers is None else self.answers[tokens]
        return Batch(self.ids[tokens], self.lengths[sequences], self.sequences[documents], answers)

    def with_ends(self, first: Sequence[int], last: Sequence[int], dtype: np.dtype) -> Batch:
        """Return the batch with the tokens `first` before and `last` after every document that is not empty.

        The ids are of type `dtype`, if it holds them. In a loss mask, the first tokens belong to the prompt, the
        last ones to what the document ends with; a document that ends with these already, from its chat template, gets
        no second ones.
        """
        if (not first and not last) or self.ids.max(initial=0) > np.iinfo(dtype).max:
            return self
        filled = self.sequences > 0
        end_sequences = np.cumsum(self.sequences)[filled] - 1
        start_sequences = end_sequences - self.sequences[filled] + 1
        ends = np.cumsum(self.lengths)
        starts = (ends - self.lengths)[start_sequences].tolist()
        spans = list(zip(starts, ends[end_sequences].tolist(), strict=True))
        before, after = ([np.array(tokens, dtype)] if tokens else [] for tokens in (first, last))
        added = np.full(len(spans), len(last))
        if self.answers is not None and last:
            added[[self.ids[max(start, end - len(last)) : end].tolist() == [*last] for start, end in spans]] = 0
        # Slices are copied several times as fast as a mask selects.
        parts = [
            part
            for (start, end), count in zip(spans, added.tolist(), strict=True)
            for part in (*before, self.ids[start:end], *(after if count else ()))
        ]
        ids = np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.empty(0, dtype)
        lengths = self.lengths.copy()
        lengths[start_sequences] += len(first)
        lengths[end_sequences] += added
        answers = self.answers
        if answers is not None:
            prompt = np.zeros(len(first), answers.dtype)
            masks = [
                part
                for (start, end), count in zip(spans, added.tolist(), strict=True)
                for part in (prompt, answers[start:end], np.repeat(answers[end - 1 : end], count))
            ]
            answers = np.concatenate(masks) if masks else answers
        return Batch(ids, lengths, self.sequences, answers)

    def followed_by(self, other: Batch) -> Batch:
        """Return the batch of these documents and those of `other`."""
        return Batch(
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.sequences, other.sequences]),
        )

    def part(self, first: int, last: int) -> Batch:
        """Return the batch of documents [first, last)."""
        start, end = int(self.sequences[:first].sum()), int(self.sequences[:last].sum())
        tokens = slice(int(self.lengths[:start].sum()), int(self.lengths[:end].sum()))
        return Batch(self.ids[tokens], self.lengths[start:end], self.sequences[first:last])

    def joined(self, starts: Sequence[int], *, one_sequence: bool) -> Batch:
        """Return the batch with documents joined: each from one of `starts` (the first is 0) to the next."""
        if not len(starts):
            return self
        if not one_sequence:
            return Batch(self.ids, self.lengths, np.add.reduceat(self.sequences, starts))
        tokens = np.add.reduceat(self.document_tokens, starts)
        return Batch(self.ids, tokens[tokens > 0], (tokens > 0).astype(np.int64))


def note_outliers(
    batch: Batch, lines: npt.NDArray[np.int64], files: Sequence[str] | None, unknown: int | None, report: UnitReport
) -> None:
    """Add the longest, most repetitive and most unknown documents of a batch to a report.

    Args:
        batch: documents before BOS and EOD tokens are added.
        lines: [documents] line number of each document.
        files: [documents] path of each document, if they are files.
        unknown: id of the unknown token, if the vocabulary has one.
        report: receives the examples.
    """
    tokens = batch.document_tokens
    if not len(tokens):
        return

    def note(kind: str, at: int, score: float, what: str) -> None:
        report.note(kind, Example(int(lines[at]), score, what, files[at] if files else ""))

    at = int(np.argmax(tokens))
    note("longest", at, float(tokens[at]), f"({int(tokens[at]):,} tokens in the input, without special tokens)")
    ends = np.cumsum(tokens)
    long = np.flatnonzero(tokens >= WINDOW)
    starts = ends[long] - tokens[long] // 2 - WINDOW // 2
    # The first tokens of a window are distinct enough in nearly all documents. Many windows are sorted at once, by the
    # lower half of each id, which can only make them less distinct.
    few = np.sort(batch.ids[starts[:, None] + np.arange(FEW)].astype(np.uint16), axis=1)
    varied = 1 + np.count_nonzero(few[:, 1:] != few[:, :-1], axis=1) >= REPETITIVE_BELOW * WINDOW
    for i, start in zip(long[~varied].tolist(), starts[~varied].tolist(), strict=True):
        window = np.sort(batch.ids[start : start + WINDOW])
        distinct = 1 + int(np.count_nonzero(window[1:] != window[:-1]))
        if distinct < REPETITIVE_BELOW * WINDOW:
            text = f"({distinct:,} distinct tokens among {WINDOW:,} in its middle)"
            note("repetitive", i, 1.0 - distinct / WINDOW, text)
    if unknown is None:
        return
    documents = np.searchsorted(ends, np.flatnonzero(batch.ids == unknown), side="right")
    report.unknown += len(documents)
    counts = np.bincount(documents, minlength=len(tokens))
    for i in np.flatnonzero(counts > tokens * UNKNOWN_ABOVE).tolist():
        share = counts[i] / tokens[i]
        note("with_unknown", i, float(share), f"({share:.0%} of its tokens)")
