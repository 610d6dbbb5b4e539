"""Outlier report of preprocessing: longest, most repetitive and most unknown-token documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_lite.data.preparation.batch import Batch
from megatron_lite.data.preparation.report import Example, Report

WINDOW = 4096
REPETITIVE_BELOW = 0.02
"""A document is called repetitive if the window in its middle has fewer distinct tokens than this share."""

UNKNOWN_ABOVE = 0.05
"""A document with more than this share of unknown tokens is named."""


def note_outliers(batch: Batch, lines: Sequence[int], unknown: int | None, report: Report) -> None:
    """Look at a batch of documents, whose lines of the unit are `lines`, before ends of documents are added."""
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
            what = f"({distinct:,} distinct tokens among {WINDOW:,} in its middle)"
            report.note("repetitive", Example(lines[i], 1.0 - distinct / WINDOW, what))
    if unknown is None:
        return
    places = np.searchsorted(ends, np.flatnonzero(batch.ids == unknown), side="right")
    report.unknown += len(places)
    counts = np.bincount(places, minlength=len(tokens))
    for i in np.flatnonzero(counts > tokens * UNKNOWN_ABOVE).tolist():
        share = counts[i] / tokens[i]
        report.note("with_unknown", Example(lines[i], float(share), f"({share:.0%} of its tokens)"))
