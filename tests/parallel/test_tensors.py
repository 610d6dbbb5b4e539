"""Tests of rectangles of flattened ranges."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.parallel.tensors import rectangles

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@given(ranges())
def test_rectangles_cover_the_range_once_and_in_order(case):
    shape, start, stop = case
    tensor = np.arange(math.prod(shape)).reshape(shape)
    blocks = list(rectangles(shape, start, stop))
    covered = []
    for block in blocks:
        place = tuple(slice(first, first + size) for first, size in zip(block.offset, block.shape, strict=True))
        elements = tensor[place].ravel().tolist()
        assert elements == list(range(block.start, block.start + math.prod(block.shape)))
        covered += elements
    assert covered == list(range(start, stop))
    assert len(blocks) <= max(1, 2 * len(shape) - 1)


def test_a_range_of_a_matrix_is_three_rectangles():
    assert [(b.offset, b.shape) for b in rectangles((5, 4), 2, 15)] == [
        ((0, 2), (1, 2)),
        ((1, 0), (2, 4)),
        ((3, 0), (1, 3)),
    ]
    assert [(b.offset, b.shape) for b in rectangles((5, 4), 0, 20)] == [((0, 0), (5, 4))]
    assert [(b.offset, b.shape) for b in rectangles((5, 4), 5, 7)] == [((1, 1), (1, 2))]
    assert list(rectangles((5, 4), 7, 7)) == []
    assert [(b.offset, b.shape) for b in rectangles((), 0, 1)] == [((), ())]
