"""Length histograms and the check of all token ids, against reference loops."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.preparation import survey
from megatron_lite.data.preparation.survey import check_all_tokens, draw_lengths, draw_lengths_svg, survey_lengths
from megatron_lite.errors import DataError


def write(prefix, sizes, value=7):
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for size in sizes:
            writer.add_sequence(np.full(size, value))
            writer.end_document()
    return IndexedDataset(prefix)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 3000), max_size=40))
def test_lengths_equal_a_reference_count(tmp_path, sizes):
    lengths = survey_lengths(write(tmp_path / "a", sizes))
    expected = np.zeros(31, dtype=int)
    for size in sizes:
        if size:
            expected[size.bit_length() - 1] += 1
    assert lengths.counts.tolist() == expected.tolist()
    assert lengths.tokens.sum() == sum(sizes)
    assert lengths.empty == sizes.count(0)
    assert (lengths.shortest, lengths.longest) == (min(sizes, default=0), max(sizes, default=0))
    lines = draw_lengths(lengths)
    assert max(map(len, lines)) <= 80
    assert len(lines) == (2 + np.ptp(np.flatnonzero(expected)) if expected.any() else 1)
    ElementTree.fromstring(draw_lengths_svg(lengths, "<a & b>"))


def test_an_id_outside_the_vocabulary_is_found_with_its_position(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "CHECKED_TOKENS", 16)
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for number in range(20):
            writer.add_document([99 if number == 13 and place == 2 else 1 for place in range(5)])
    data = IndexedDataset(tmp_path / "a")
    assert list(check_all_tokens(data, 100)) == [16, 32, 48, 64, 80, 96, 100]
    with pytest.raises(DataError, match=r"id 99 \(sequence 13, token 67 of the file\)"):
        list(check_all_tokens(data, 99))
