"""Every layout loads the checkpoints of every other bit for bit; in the same layout, a resume is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.layout_matrix import SP, ZERO1, Cell
from support.resume import check

pytestmark = pytest.mark.slow

LAYOUTS = (
    Cell(),
    Cell(tp=2, **SP),
    Cell(dp=2),
    Cell(dp=2, **ZERO1),
    Cell(pp=2),
    Cell(pp=2, schedule="zb-v"),
    Cell(pp=2, schedule="interleaved", layers_per_chunk=1),
    Cell(tp=2, dp=2, **ZERO1),
    Cell(pp=2, dp=2, schedule="zb-h1", **ZERO1),
)
# Dropout and half precision, whose random numbers and roundings must come back as well.
NOISY = tuple(replace(cell, dropout="all", dtype="bf16") for cell in (LAYOUTS[0], *LAYOUTS[6:], Cell(cp=2)))


@pytest.mark.parametrize("writer", LAYOUTS, ids=str)
def test_every_ordered_pair_of_layouts(writer, on_ranks, tmp_path):
    check(writer, LAYOUTS, on_ranks, tmp_path)


@pytest.mark.parametrize("writer", NOISY, ids=str)
def test_dropout_and_bf16_resume_bit_for_bit(writer, on_ranks, tmp_path):
    check(writer, [writer], on_ranks, tmp_path)
