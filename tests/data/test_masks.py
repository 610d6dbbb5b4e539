"""Masks, positions and document numbers against a plain loop over each sample."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatron_lite.data.masks import document_ids, loss_mask, position_ids

EOD = 0


@given(tokens=arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 20)), elements=st.integers(0, 3)))
def test_equal_a_plain_loop(tokens):
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
