"""Batch of tokenized documents: BOS and EOD tokens added, documents filtered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.tokenizer.base import TokenBatch

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """Documents as sequences of tokens, all end to end.

    Attributes:
        ids: [tokens].
        lengths: tokens of each sequence, [sequences]; none is 0.
        sequences: sequences of each document, [documents]; 0 for an empty one.
    """

    ids: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]

    @classmethod
    def of(cls, encoded: TokenBatch, sequences: npt.NDArray[np.int64]) -> Batch:
        """From `sequences` encoded texts a document; texts without tokens are no sequences."""
        filled = encoded.lengths > 0
        if filled.all():
            return cls(encoded.ids, encoded.lengths, sequences)
        document = np.repeat(np.arange(len(sequences)), sequences)
        return cls(encoded.ids, encoded.lengths[filled], np.bincount(document[filled], minlength=len(sequences)))

    @property
    def document_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, [documents]."""
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        last = np.cumsum(self.sequences)
        return ends[last] - ends[last - self.sequences]

    def keep(self, documents: Mask) -> Batch:
        """Only the documents of a mask, [documents]."""
        if documents.all():
            return self
        sequences = np.repeat(documents, self.sequences)
        return Batch(self.ids[np.repeat(sequences, self.lengths)], self.lengths[sequences], self.sequences[documents])

    def with_bos(self, bos: int) -> Batch:
        """`bos` before the first sequence of every document that has one."""
        filled = self.sequences > 0
        first = (np.cumsum(self.sequences) - self.sequences)[filled]
        starts = np.cumsum(self.lengths) - self.lengths
        lengths = self.lengths.copy()
        lengths[first] += 1
        return Batch(np.insert(self.ids, starts[first], np.uint32(bos)), lengths, self.sequences)

    def with_eod(self, eod: int) -> Batch:
        """`eod` appended to the last sequence of every document that has one."""
        filled = self.sequences > 0
        last = np.cumsum(self.sequences)[filled] - 1
        lengths = self.lengths.copy()
        lengths[last] += 1
        ids = np.full(len(self.ids) + len(last), eod, np.uint32)
        text = np.ones(len(ids), np.bool_)
        text[np.cumsum(lengths)[last] - 1] = False
        ids[text] = self.ids
        return Batch(ids, lengths, self.sequences)
