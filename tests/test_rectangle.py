"""Tests of rectangles: intersections, and ranges of flattened tensors."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.rectangle import Rectangle, rectangles_of_range

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(SHAPES)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


def place(rectangle):
    return tuple(slice(a, a + length) for a, length in zip(rectangle.offset, rectangle.shape, strict=True))


@given(ranges())
def test_rectangles_cover_the_range_once_and_in_order(case):
    shape, start, stop = case
    tensor = np.arange(math.prod(shape)).reshape(shape)
    blocks = list(rectangles_of_range(shape, start, stop))
    covered = []
    for block in blocks:
        elements = tensor[place(block)].ravel().tolist()
        assert elements == list(range(elements[0], elements[0] + block.numel))
        covered += elements
    assert covered == list(range(start, stop))
    assert len(blocks) <= max(1, 2 * len(shape) - 1)


def test_a_range_of_a_matrix_is_three_rectangles():
    assert [(b.offset, b.shape) for b in rectangles_of_range((5, 4), 2, 15)] == [
        ((0, 2), (1, 2)),
        ((1, 0), (2, 4)),
        ((3, 0), (1, 3)),
    ]
    assert [(b.offset, b.shape) for b in rectangles_of_range((5, 4), 0, 20)] == [((0, 0), (5, 4))]
    assert [(b.offset, b.shape) for b in rectangles_of_range((5, 4), 5, 7)] == [((1, 1), (1, 2))]
    assert list(rectangles_of_range((5, 4), 7, 7)) == []
    assert [(b.offset, b.shape) for b in rectangles_of_range((), 0, 1)] == [((), ())]


@st.composite
def pairs(draw):
    shape = draw(st.lists(st.integers(0, 6), max_size=3).map(tuple))
    found = []
    for _ in range(2):
        offset = tuple(draw(st.integers(0, size)) for size in shape)
        extent = tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True))
        found.append(Rectangle(offset, extent))
    return shape, *found


@given(pairs())
def test_intersection_holds_the_common_elements(case):
    shape, one, other = case
    marked = np.zeros(shape, int)
    marked[place(one)] += 1
    marked[place(other)] += 1
    common = one.intersection(other)
    assert common == other.intersection(one)
    assert (common is None) == (not (marked == 2).any())
    if common is not None:
        assert (marked[place(common)] == 2).all() and common.numel == (marked == 2).sum()
        assert common.relative_to(one.offset).shifted(one.offset) == common


def test_full_rectangle():
    assert Rectangle.full([3, 4]) == Rectangle((0, 0), (3, 4))
    assert Rectangle.full(()).numel == 1
