import math
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.values import MAX_NUMBER, MAX_REAL, read_as, read_bool, read_float, read_int, write_value


@pytest.mark.parametrize(
    ("word", "number"),
    [("5_000_000", 5_000_000), ("1e4", 10_000), ("10e6", 10_000_000), ("-3", -3), ("2.5e1", 25), ("0", 0)],
)
def test_whole_numbers(word, number):
    assert read_int(word) == number
    assert isinstance(read_int(word), int)


@pytest.mark.parametrize("word", ["1e-1", "2.5", "ten", "", "inf", "nan", "1e400", "0x10"])
def test_not_whole_numbers(word):
    with pytest.raises(ValueError, match="a whole number"):
        read_int(word)


@pytest.mark.parametrize(("word", "number"), [("6.0e-5", 6e-5), (".01", 0.01), ("1_000.5", 1000.5), ("-1", -1.0)])
def test_numbers(word, number):
    assert read_float(word) == number


@pytest.mark.parametrize("word", ["inf", "nan", "-inf", "1e999", "x"])
def test_not_numbers(word):
    with pytest.raises(ValueError, match="number"):
        read_float(word)


def test_booleans():
    assert [read_bool(word) for word in ("True", "true", "1", "yes")] == [True] * 4
    assert [read_bool(word) for word in ("False", "false", "0", "no")] == [False] * 4
    with pytest.raises(ValueError, match="True or False"):
        read_bool("maybe")


def test_choices_and_spellings():
    kind = Literal["learned", "rotary"]
    assert read_as(kind, "Rotary", {}) == "rotary"
    assert read_as(kind, "ROPE", {"rope": "rotary"}) == "rotary"
    assert read_as(float | None, "0.5", {}) == 0.5
    with pytest.raises(ValueError, match="one of learned, rotary, rope"):
        read_as(kind, "alibi", {"rope": "rotary"})


@settings(max_examples=200)
@given(st.one_of(st.integers(-MAX_NUMBER, MAX_NUMBER), st.floats(-MAX_REAL, MAX_REAL, allow_nan=False)))
def test_numbers_are_written_as_they_are_read(number):
    word = write_value(number)
    if isinstance(number, int):
        assert read_int(word) == number
    else:
        assert read_float(word) == number
        assert math.copysign(1, read_float(word)) == math.copysign(1, number) or number == 0
