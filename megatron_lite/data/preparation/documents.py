"""JSON line parser of preprocessing: extracts the texts of a document, or the reason for rejecting it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lite.data.preparation.lines import Line
from megatron_lite.data.preparation.sources import Unit

SURROGATE = re.compile("[\ud800-\udfff]")


class _Repeating(dict[str, Any]):
    """A JSON object with a key more than once: readers keep the last one's value, and lose the others without a word.

    Attributes:
        names: how often each key is in it.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = Counter(name for name, _ in pairs)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    return entry if len(entry) == len(pairs) else _Repeating(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class BadLineError(ValueError):
    """A line that holds no document: the message says why, in a few words."""


def parse_line(line: Line, keys: Sequence[str]) -> list[str] | None:
    """The texts under `keys` of one JSON line; None for a line of blanks.

    Raises:
        BadLineError: it is not UTF-8 or JSON, not an object, or lacks a text under one of the keys.
    """
    if line.too_long:
        raise BadLineError("longer than --max-line-mb")
    content = line.content
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    if not content.strip():
        return None
    try:
        entry = DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # some of its messages end where a place is to follow
        raise BadLineError(f"not JSON: {what} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON that can be read: {error}") from error
    if not isinstance(entry, dict):
        raise BadLineError(f"not a JSON object but {type(entry).__name__}")
    if isinstance(entry, _Repeating):
        _refuse_duplicates(entry, keys)
    texts = [_text(entry, key) for key in keys]
    if b"\\u" in content:
        _refuse_surrogates(texts, keys)
    return texts


def _text(entry: dict[str, Any], key: str) -> str:
    if key not in entry:
        raise BadLineError(f"no key {key!r} (it has {', '.join(map(repr, list(entry)[:8])) or 'none'})")
    text = entry[key]
    if not isinstance(text, str):
        raise BadLineError(f"the value of {key!r} is {'null' if text is None else type(text).__name__}, not a string")
    return text


def _refuse_duplicates(entry: _Repeating, keys: Sequence[str]) -> None:
    for key in keys:
        if entry.names[key] > 1:
            raise BadLineError(f"key {key!r} twice")


def _refuse_surrogates(texts: Sequence[str], keys: Sequence[str]) -> None:
    for text, key in zip(texts, keys, strict=True):
        half = SURROGATE.search(text)
        if half:
            raise BadLineError(f"half a surrogate pair in {key!r} at character {half.start() + 1}")


def lines_before(unit: Unit) -> int:
    """Lines of the unit's file that belong to units before it: read again, which only an error needs."""
    if not unit.start:
        return 0
    count = 0
    with Path(unit.source.path).open("rb") as file:
        left = unit.start
        last = b""
        while left and (piece := file.read(min(left, 1 << 20))):
            count += piece.count(b"\n")
            left -= len(piece)
            last = piece[-1:]
    return count + (last != b"\n")
