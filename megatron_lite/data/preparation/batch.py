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

UNKNOWN_ABOVE = 0.05
"""Share of unknown tokens above which a document is reported."""


@dataclass(frozen=True)
class Batch:
    """Concatenated documents of one or more sequences.

    Attributes:
        ids: [tokens] token ids.
        lengths: [sequences] tokens of each sequence, at least 1.
        sequences: [documents] sequences of each document, 0 for an empty one.
    """

    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]

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
        return Batch(self.ids[np.repeat(sequences, self.lengths)], self.lengths[sequences], self.sequences[documents])

    def with_bos(self, bos: int) -> Batch:
        """Return the batch with `bos` before the first sequence of every document that is not empty."""
        filled = self.sequences > 0
        first = (np.cumsum(self.sequences) - self.sequences)[filled]
        starts = np.cumsum(self.lengths) - self.lengths
        lengths = self.lengths.copy()
        lengths[first] += 1
        return Batch(np.insert(self.ids, starts[first], np.uint32(bos)), lengths, self.sequences)

    def with_eod(self, eod: int) -> Batch:
        """Return the batch with `eod` after the last sequence of every document that is not empty."""
        filled = self.sequences > 0
        last = np.cumsum(self.sequences)[filled] - 1
        lengths = self.lengths.copy()
        lengths[last] += 1
        ids = np.full(len(self.ids) + len(last), eod, np.uint32)
        text = np.ones(len(ids), np.bool_)
        text[np.cumsum(lengths)[last] - 1] = False
        ids[text] = self.ids
        return Batch(ids, lengths, self.sequences)


def note_outliers(batch: Batch, lines: Sequence[int], unknown: int | None, report: UnitReport) -> None:
    """Add the longest, most repetitive and most unknown documents of a batch to a report.

    Args:
        batch: documents before BOS and EOD tokens are added.
        lines: [documents] line number of each document.
        unknown: id of the unknown token, if the vocabulary has one.
        report: receives the examples.
    """
    tokens = batch.document_tokens
    if not len(tokens):
        return
    at = int(np.argmax(tokens))
    report.note("longest", Example(lines[at], float(tokens[at]), f"({int(tokens[at]):,} tokens)"))
    ends = np.cumsum(tokens)
    for i in np.flatnonzero(tokens >= WINDOW).tolist():
        middle = int(ends[i] - tokens[i] // 2)
        window = batch.ids[middle - WINDOW // 2 : middle + WINDOW // 2]
        distinct = int(np.count_nonzero(np.bincount(window)))
        if distinct < REPETITIVE_BELOW * WINDOW:
            text = f"({distinct:,} distinct tokens among {WINDOW:,} in its middle)"
            report.note("repetitive", Example(lines[i], 1.0 - distinct / WINDOW, text))
    if unknown is None:
        return
    documents = np.searchsorted(ends, np.flatnonzero(batch.ids == unknown), side="right")
    report.unknown += len(documents)
    counts = np.bincount(documents, minlength=len(tokens))
    for i in np.flatnonzero(counts > tokens * UNKNOWN_ABOVE).tolist():
        share = counts[i] / tokens[i]
        report.note("with_unknown", Example(lines[i], float(share), f"({share:.0%} of its tokens)"))
