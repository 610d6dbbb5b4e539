import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.generation.stream import TextStream


class Bytes:
    """Every id is a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """Like sentencepiece: a word carries a space before it, which a text's first word loses."""

    def decode(self, ids):
        return " ".join(f"w{token}" for token in ids)


def encode(text):
    return list(text.encode("utf-8"))


@given(st.text(max_size=30), st.text(max_size=30))
def test_pieces_join_to_the_whole_and_hold_whole_characters(context, text):
    stream = TextStream(Bytes(), encode(context))
    pieces = [stream.push(token) for token in encode(text)]
    assert "".join(pieces) + stream.flush() == text
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_end_up_as_their_decoding(ids):
    stream = TextStream(Bytes())
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text == Bytes().decode(ids)


def test_text_is_told_as_soon_as_it_is_certain():
    stream = TextStream(Bytes())
    assert [stream.push(token) for token in encode("aé€")] == ["a", "", "é", "", "", "€"]
    assert stream.flush() == ""


def test_a_character_that_never_ends_is_flushed():
    stream = TextStream(Bytes())
    assert [stream.push(token) for token in encode("a€")[:-1]] == ["a", "", ""]
    assert stream.flush() == "�"


@pytest.mark.parametrize("length", [0, 1, 5, 30])
def test_spaces_between_words_depend_on_the_context(length):
    context, new = list(range(length)), [90, 91, 92]
    stream = TextStream(Words(), context)
    text = "".join(stream.push(token) for token in new) + stream.flush()
    assert Words().decode(context) + text == Words().decode(context + new)
