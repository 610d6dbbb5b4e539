"""Tests of the tiling grid: complete cover, bounded sizes, lines at tensor-parallel splits."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import tiles as module
from megatron_lite.checkpoint.tiles import MAX_TILE, MIN_TILE, grid, tiles
from megatron_lite.rectangle import Rectangle

SHAPES = st.one_of(st.tuples(st.integers(0, 100)), st.lists(st.integers(0, 12), max_size=4).map(tuple))
LARGE = st.lists(st.integers(1, 1 << 22), max_size=4).map(tuple).filter(lambda shape: prod(shape) < 1 << 34)


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Cut tensors of a few hundred elements as others of gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_TILE", 32)
        patch.setattr(module, "MAX_TILE", 128)
        yield


@st.composite
def parts(draw):
    shape = draw(SHAPES)
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    extent = tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True))
    return shape, Rectangle(offset, extent)


def place(rectangle):
    return tuple(slice(a, a + length) for a, length in zip(rectangle.offset, rectangle.shape, strict=True))


@settings(max_examples=300, deadline=None)
@given(parts(), st.sampled_from([1, 2, 4, 8]))
def test_tiles_cover_a_rectangle_and_each_lies_in_one_tile_of_the_tensor(case, itemsize):
    shape, rectangle = case
    count = np.zeros(shape, int)
    number = np.zeros(shape, int)
    for index, tile in enumerate(tiles(shape, itemsize), 1):
        number[place(tile)] = index
    for tile in tiles(shape, itemsize, rectangle):
        assert tile.numel > 0
        assert tile.numel * itemsize <= 128
        count[place(tile)] += 1
        assert len(np.unique(number[place(tile)])) == 1
    wanted = np.zeros(shape, int)
    wanted[place(rectangle)] = 1
    assert np.array_equal(count, wanted)


@settings(deadline=None)
@given(LARGE, st.sampled_from([1, 2, 4, 8]))
def test_tiles_are_neither_large_nor_many(shape, itemsize):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_TILE", MIN_TILE)
        patch.setattr(module, "MAX_TILE", MAX_TILE)
        counts = grid(shape, itemsize)
    size = prod(shape) * itemsize
    assert all(1 <= count <= extent for count, extent in zip(counts, shape, strict=True))
    assert prod(-(-extent // count) for extent, count in zip(shape, counts, strict=True)) * itemsize <= MAX_TILE
    if prod(counts) > 1:
        # A dim of 3 in 2 parts has one of 2, so a tile may be larger than the mean, and be cut again.
        assert size / prod(counts) >= MIN_TILE / 4


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1]))
def test_tensor_parallel_splits_fall_between_tiles(tp, rows, columns, dim):
    shape = (8 * rows, 8 * columns)
    extent = tuple(size // tp if d == dim else size for d, size in enumerate(shape))
    whole = set(tiles(shape, 32))
    parts = []
    for rank in range(tp):
        offset = tuple(rank * extent[d] if d == dim else 0 for d in range(2))
        parts += tiles(shape, 32, Rectangle(offset, extent))
    assert len(parts) == len(whole)
    assert set(parts) == whole


def test_the_grid_of_known_sizes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_TILE", MIN_TILE)
        patch.setattr(module, "MAX_TILE", MAX_TILE)
        assert grid((), 4) == []
        assert grid((1024, 1024), 4) == [1, 1]
        assert grid((2048, 8192), 4) == [4, 4]
        assert grid((2, 8192, 2048), 4) == [2, 4, 4]
        # GPT-3's: 64 tiles of 18.9 MB.
        assert grid((49152, 12288), 2) == [8, 8]
        # A vocabulary of 250,880: the table is cut on along its rows.
        assert grid((250880, 14336), 4) == [64, 8]
