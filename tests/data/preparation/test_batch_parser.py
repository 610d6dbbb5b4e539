"""Batch parser: the documents and reasons of parse_line for every line, with and without orjson."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lite.data.preparation import documents
from megatron_lite.data.preparation.documents import BadLineError, BatchParser, parse_line
from megatron_lite.data.preparation.lines import _split

LINES = [
    b'{"text": "a"}',
    b'{"text": "b", "title": "t"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "t\\u0065xt": "b"}',
    b'{"t\\u0065xt": "b", "title": ""}',
    b'{"\\u0074ex\\u0074" : "b", "title": "", "text"\t: "c"}',
    b'{"text": "\\u0065 \\u00e9", "title": "text"}',
    b'{"type": "text", "text": "a", "title": "x"}',
    b'{"text": "a", "meta": {"text": "b"}, "title": "\\"text\\": "}',
    b'{"text": "\\ud800", "title": "x"}',
    b'{"text": "a", "title": "\\udc00", "other": 1}',
    b'{"text": "a", "other": "\\ud800", "title": "x"}',
    b'{"text": null}',
    b'{"text": 1}',
    b'{"text": "a", "n": NaN, "title": "x"}',
    b'{"text": "a", "n": 1e999, "title": "x"}',
    b"",
    b"  \t ",
    b"{",
    b"[1]",
    b'"text"',
    b"7",
    b'{"text": "\xff"}',
    b'\xef\xbb\xbf{"text": "bom", "title": "x"}',
    b'{"text": "a"} {"text": "b"}',
    b'{"text": "' + b"x" * 80 + b'"}',
    '{"text": "東 \u2028", "title": "é"}\r'.encode(),
]


def expected(batch, keys):
    texts, blank, bad = [], 0, []
    for row in range(len(batch.contents)):
        try:
            found = parse_line(batch.line(row), keys)
        except BadLineError as error:
            bad.append((row, str(error)))
            continue
        blank += found is None
        texts += [] if found is None else [(row, *found)]
    return texts, blank, bad


@pytest.mark.parametrize("installed", [True, False])
@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.sampled_from(LINES), max_size=6),
    keys=st.sampled_from([("text",), ("text", "title"), ("t\u00e9xt",), ("a/b", "text")]),
    ended=st.booleans(),
)
@example(lines=[LINES[16], LINES[2]], keys=("text",), ended=True)
def test_equals_parse_line(installed, lines, keys, ended):
    """A blank line and a line with a key twice have as many keys together as two sound lines."""
    pytest.importorskip("orjson")
    batch = _split(b"\n".join(lines) + b"\n" * ended, cut=False, first=1, max_line=70, position=0)
    parser = BatchParser(keys)
    if not installed:
        parser._load = None
    parsed = parser.parse(batch, np.ones(len(batch.contents), np.bool_))
    texts, blank, bad = expected(batch, keys)
    assert list(zip(parsed.rows, *parsed.texts, strict=True)) == texts
    assert (parsed.blank, parsed.bad) == (blank, bad)


def test_lines_outside_a_mask_are_not_parsed():
    batch = _split(b'{"text": "a"}\n{\n{"text": "b"}\n', cut=False, first=1, max_line=70, position=0)
    parsed = BatchParser(["text"]).parse(batch, np.array([True, False, True]))
    assert (parsed.rows, parsed.texts, parsed.bad) == ([0, 2], [["a", "b"]], [])


@pytest.mark.parametrize("character", ["a", "é", "\n", '"', "\\", "\u2028", "🙂"])
def test_texts_are_read_as_they_were_written(character):
    for ascii_only in (True, False):
        line = json.dumps({"text": character * 3}, ensure_ascii=ascii_only).encode() + b"\n"
        batch = _split(line, cut=False, first=1, max_line=1000, position=0)
        assert BatchParser(["text"]).parse(batch, np.ones(1, np.bool_)).texts == [[character * 3]]


PATTERNS = ['"a"', '"ab"', "\\u00"]


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(st.sampled_from([*PATTERNS, "a", "0", "\\", '"']), max_size=8).map("".join),
    pattern=st.sampled_from(PATTERNS),
    window=st.integers(1, 6),
)
def test_occurrences_are_found_at_any_position(content, pattern, window):
    """Also across the windows that are searched at once."""
    content, pattern = content.encode(), pattern.encode()
    wanted = [at for at in range(len(content)) if content.startswith(pattern, at)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SEARCHED", 2 * window)
        assert documents._occurrences(content, np.frombuffer(content, np.uint8), pattern).tolist() == wanted
