"""Masks, position ids and document ids against a reference loop over each sample."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_lite.data.serving.masks import document_ids, document_rows, loss_mask, position_ids

EOD = 0


@given(tokens=arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 20)), elements=st.integers(0, 3)))
def test_equal_a_reference_loop(tokens):
    masks, positions, documents = [], [], []
    for row in tokens:
        position = document = 0
        for token in row:
            masks.append(float(token != EOD))
            positions.append(position)
            documents.append(document)
            position += 1
            if token == EOD:
                position, document = 0, document + 1
    assert loss_mask(tokens, EOD).ravel().tolist() == masks
    assert position_ids(tokens, EOD).ravel().tolist() == positions
    assert document_ids(tokens, EOD).ravel().tolist() == documents
    assert loss_mask(tokens, EOD).dtype == np.float32


@given(tokens=arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 20)), elements=st.integers(0, 3)))
def test_rows_contain_each_document_in_order(tokens):
    size, length = tokens.shape
    ids = document_ids(tokens, EOD)
    documents: dict[tuple[int, int], list[int]] = {}
    for sample, position in np.ndindex(size, length):
        documents.setdefault((sample, int(ids[sample, position])), []).append(position * size + sample)
    found = document_rows(ids)
    if found is None:
        assert len(documents) == size
        return
    rows, places, groups, cu_seqlens = found
    whole = sorted(documents.items())
    assert cu_seqlens.tolist() == [0, *np.cumsum([len(document) for _, document in whole]).tolist()]
    assert cu_seqlens.dtype == np.int32
    assert rows[places].tolist() == list(range(tokens.size))
    expected = sorted(documents.values(), key=len)
    assert rows.tolist() == [row for document in expected for row in document]
    assert [kind for count, kind in groups for _ in range(count)] == [len(document) for document in expected]
    assert len({kind for _, kind in groups}) == len(groups) < (2 * tokens.size) ** 0.5
