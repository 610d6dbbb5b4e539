"""Sizes, counts and durations in messages: rounding at the border between two units."""

import pytest

from megatron_lite.formatting import (
    format_count,
    format_duration,
    format_number,
    format_parameters,
    format_perplexity,
    format_ranges,
    format_shape,
    format_short,
    format_size,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1.94 * 2**20, "1.94 MiB"),
        (999 * 2**30, "999 GiB"),
        (1000 * 2**30, "0.977 TiB"),
        (2500 * 2**40, "2,500 TiB"),
    ],
)
def test_sizes(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (12, "12"),
        (999, "999"),
        (9_999, "10K"),
        (4_800_000, "4.8M"),
        (38_500_000, "38M"),
        (999_600_000, "1.0B"),
        (1_315_000_000, "1.3B"),
        (9_949_000_000, "9.9B"),
        (12_853_386_240, "13B"),
        (10**12, "1.0T"),
    ],
)
def test_parameters(parameters, name):
    assert format_parameters(parameters) == name


def test_durations():
    assert format_duration(0.4) == "00:00:00"
    assert format_duration(3661) == "01:01:01"
    assert format_duration(2 * 86400 + 5) == "2d 00:00:05"
    assert format_duration(float("inf")) == "unknown"
    assert format_duration(-3) == "00:00:00"


def test_short_numbers_have_three_digits():
    assert [format_short(value) for value in (0, 999, 1000, 12345, 999_600, 2.5e9)] == [
        *("0", "999", "1.0k", "12.3k", "1.0M", "2.5G")
    ]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([1], "1"), ([1, 2, 3, 5], "1-3, 5"), (range(0, 40, 2), "0, 2, 4, 6, 8, 10, 12, 14 and 12 more")],
)
def test_rank_ranges(ranks, text):
    assert format_ranges(list(ranks)) == text


def test_counts_numbers_perplexities_and_shapes():
    assert [format_count(number, "file") for number in (0, 1, 1200)] == ["0 files", "1 file", "1,200 files"]
    assert [format_number(number) for number in (65535, 10**15, 0.5)] == ["65,535", "1e+15", "0.5"]
    assert [format_perplexity(value) for value in (2345.678, 1.5e9)] == ["2,345.68", "1.50e+09"]
    assert [format_shape(shape) for shape in ((2, 3), ())] == ["2 x 3", "scalar"]
