"""Joining of short documents (--join-short): a short document is concatenated with the following ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.data.preparation.batch import Batch


class ShortDocumentJoiner:
    """Joins consecutive documents of a unit until each has enough tokens; the tokens and their order do not change.

    The last documents of a unit, if they are too few for a document of their own, are appended to the one before.

    Args:
        min_tokens: least tokens of a document, without the tokens that begin and end the original ones.
        one_sequence: store each document as one sequence; otherwise, the sequences stay as they are.

    Attributes:
        joined: number of documents that were appended to another one.
        short: number of documents that are still too short, as their unit has no other ones.
    """

    def __init__(self, min_tokens: int, *, one_sequence: bool) -> None:
        self.min_tokens = min_tokens
        self.one_sequence = one_sequence
        self.joined = self.short = 0
        self._held: Batch | None = None
        self._counts: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._order: npt.NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(
        self, batch: Batch, counts: npt.NDArray[np.int64], order: npt.NDArray[np.uint64]
    ) -> tuple[Batch, npt.NDArray[np.uint64]]:
        """Add documents, and return those that are complete, except the last one.

        Args:
            batch: the documents.
            counts: [documents] tokens of their texts.
            order: [documents] sort keys; a joined document has that of its first one.
        """
        batch = batch if self._held is None else self._held.followed_by(batch)
        counts, order = np.concatenate([self._counts, counts]), np.concatenate([self._order, order])
        ends = self._complete(counts)
        cut = ends[-2] if len(ends) > 1 else 0
        self._held, self._counts, self._order = batch.part(cut, len(counts)), counts[cut:], order[cut:]
        return self._join(batch.part(0, cut), order[:cut], ends[:-1])

    def finish(self) -> tuple[Batch, npt.NDArray[np.uint64]] | None:
        """Return the last document of the unit; None if the unit has none."""
        if self._held is None or not len(self._counts):
            return None
        if not self._complete(self._counts):
            self.short += 1
        return self._join(self._held, self._order, [len(self._counts)])

    def _complete(self, counts: npt.NDArray[np.int64]) -> list[int]:
        """Return the end of each joined document that has enough tokens, as a number of documents."""
        ends, tokens = list[int](), 0
        for number, count in enumerate(counts.tolist(), 1):
            tokens += count
            if tokens >= self.min_tokens:
                ends.append(number)
                tokens = 0
        return ends

    def _join(
        self, batch: Batch, order: npt.NDArray[np.uint64], ends: list[int]
    ) -> tuple[Batch, npt.NDArray[np.uint64]]:
        starts = [0, *ends[:-1]] if ends else []
        self.joined += len(order) - len(starts)
        return batch.joined(starts, one_sequence=self.one_sequence), order[starts]
