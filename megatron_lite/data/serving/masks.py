"""Loss masks, position ids and document ids (--eod-mask-loss, --reset-position-ids, --reset-attention-mask).

b: samples, s: sequence length. An end-of-document token belongs to the document that it ends; the next token begins
the next document.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class DocumentRows(NamedTuple):
    """Arrays of model/batch.py's Documents."""

    order: NDArray[np.int64]
    inverse: NDArray[np.int64]
    groups: tuple[tuple[int, int], ...]
    cu_seqlens: NDArray[np.int32]


def loss_mask(tokens: NDArray[np.int64], eod: int) -> NDArray[np.float32]:
    """Input tokens [b, s] -> float32 [b, s]: 0 where the input is `eod`, whose label is in another document."""
    return (tokens != eod).astype(np.float32)


def document_ids(tokens: NDArray[np.int64], eod: int) -> NDArray[np.int64]:
    """Input tokens [b, s] -> int64 [b, s]: number of each token's document, from 0 in each sample."""
    ends = (tokens == eod).astype(np.int64)
    return np.cumsum(ends, axis=-1) - ends


def document_rows(ids: NDArray[np.int64]) -> DocumentRows | None:
    """Describe the documents of a micro-batch for varlen attention.

    Args:
        ids: [b, s] document numbers from document_ids.

    Returns:
        None if every sample is one document.
    """
    size, length = ids.shape
    first = np.ones(ids.shape, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = np.flatnonzero(first)
    if len(begins) == size:
        return None
    lengths = np.diff(begins, append=ids.size)
    cu_seqlens = np.append(begins, ids.size).astype(np.int32)
    order = np.argsort(lengths, kind="stable")
    begins, lengths = begins[order], lengths[order]
    skipped = begins - (np.cumsum(lengths) - lengths)
    tokens = np.repeat(skipped, lengths) + np.arange(ids.size)
    rows = tokens % length * size + tokens // length
    inverse = np.empty_like(rows)
    inverse[rows] = np.arange(ids.size)
    unique, counts = np.unique(lengths, return_counts=True)
    return DocumentRows(rows, inverse, tuple(zip(counts.tolist(), unique.tolist(), strict=True)), cu_seqlens)


def position_ids(tokens: NDArray[np.int64], eod: int) -> NDArray[np.int64]:
    """Input tokens [b, s] -> int64 [b, s]: positions that restart at 0 after each `eod`."""
    positions = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int64), tokens.shape)
    begins = np.zeros_like(tokens)
    begins[..., 1:] = np.where(tokens[..., :-1] == eod, positions[..., 1:], 0)
    return positions - np.maximum.accumulate(begins, axis=-1)
