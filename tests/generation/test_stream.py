import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.generation.stream import StopStrings, TextStream


class Bytes:
    """Tokenizer whose ids are UTF-8 bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Words:
    """Tokenizer as sentencepiece: words have a leading space, which is dropped at the start of a text."""

    def decode(self, ids):
        return " ".join(f"w{token}" for token in ids)


def encode(text):
    return list(text.encode("utf-8"))


@given(st.text(max_size=30), st.text(max_size=30))
def test_pieces_add_up_to_the_text_and_have_complete_characters(context, text):
    stream = TextStream(Bytes(), encode(context))
    pieces = [stream.push(token) for token in encode(text)]
    assert "".join(pieces) + stream.flush() == text
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_any_bytes_add_up_to_their_decoding(ids):
    stream = TextStream(Bytes())
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text == Bytes().decode(ids)


def test_text_is_returned_when_complete():
    stream = TextStream(Bytes())
    assert [stream.push(token) for token in encode("aé€")] == ["a", "", "é", "", "", "€"]
    assert stream.flush() == ""


def test_an_incomplete_character_is_flushed():
    stream = TextStream(Bytes())
    assert [stream.push(token) for token in encode("a€")[:-1]] == ["a", "", ""]
    assert stream.flush() == "�"


@pytest.mark.parametrize("length", [0, 1, 5, 30])
def test_spaces_between_words_depend_on_the_context(length):
    context, new = list(range(length)), [90, 91, 92]
    stream = TextStream(Words(), context)
    text = "".join(stream.push(token) for token in new) + stream.flush()
    assert Words().decode(context) + text == Words().decode(context + new)


texts = st.text("ab.", max_size=12)


@given(texts, st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_a_text_ends_before_the_first_stop_string_whatever_its_pieces(text, stops, data):
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    stream, pieces, at = StopStrings(stops), [], 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        pieces.append(stream.push(text[at : at + size]))
        at += size
        assert not any(stop in "".join(pieces) for stop in stops)
    assert stream.found == bool(ends)
    assert "".join(pieces) + stream.flush() == (text[: min(ends)[1]] if ends else text)


def test_text_is_held_back_only_while_a_stop_string_may_begin_in_it():
    stream = StopStrings(["\n\nQ:"])
    assert [stream.push(piece) for piece in ("a\n", "b\n\n", "Q", "\n\n", "Q: rest", "more")] == [
        *("a", "\nb", "", "\n\nQ", "", ""),
    ]
    assert stream.found and stream.flush() == ""
