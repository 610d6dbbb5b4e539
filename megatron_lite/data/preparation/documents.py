"""Document parser: the texts of a JSON object, a plain-text line or a whole file, or the reason for rejecting it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.text_format import BOM
from megatron_lite.data.preparation.lines import Line, LineBatch, read_batches
from megatron_lite.data.preparation.options import PlainText
from megatron_lite.data.preparation.sources import Source, Unit, find_sources, plan_units
from megatron_lite.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")


class _DuplicateKeys(dict[str, Any]):
    """JSON object with duplicate keys, of which JSON parsers silently keep the last value.

    Attributes:
        names: number of occurrences of each key.
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = Counter(name for name, _ in pairs)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    return entry if len(entry) == len(pairs) else _DuplicateKeys(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class BadLineError(ValueError):
    """A line without a document; the message is the reason in a few words."""


def remedy_of_bad(source: Source, kind: str, effect: str = "") -> str:
    """Return what to do about a bad line or file (`kind`), and the effect of --skip-bad-lines on the command."""
    if source.document == "json" and ".txt" in Path(source.path.lower()).suffixes:
        return (
            f"If {source.path} is plain text, add --plain-text file (the file is one document) or --plain-text line "
            "(each line is one)"
        )
    skip = f"Repair the {kind}, or pass --skip-bad-lines to leave out and count such {kind}s"
    return f"{skip}: {effect}" if effect else skip


@dataclass
class ParsedBatch:
    """Documents of a batch of lines.

    Attributes:
        rows: [documents] indices of their lines in the batch.
        texts: [JSON keys][documents] texts; of prompts with answers (answers.py), one column of tuples.
        blank: number of blank lines.
        bad: index and reason of each line without a document.
    """

    texts: list[list[Any]]
    rows: list[int] = field(default_factory=list)
    blank: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


class BatchParser:
    """Parser of batches of JSON lines.

    orjson, if it is installed, reads the lines in which it cannot hide an error: those that it accepts, and in which
    each key occurs once. It would keep the last of several values of a key. `parse_line` reads all others, so the
    documents and the reasons are those of `parse_line`.

    Args:
        keys: names of the texts.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self._load: Callable[[bytes], Any] | None = None
        # A key that JSON can write with a short escape, or only with bytes above 127, is looked for by `parse_line`.
        if importlib.util.find_spec("orjson") and all(re.fullmatch(r"[ !#-.0-\[\]-~]+", key) for key in keys):
            self._load = importlib.import_module("orjson").loads
        self._names = [f'"{key}"'.encode() for key in keys]
        codes = {f"{ord(character):02x}" for character in "".join(keys) if character.isascii()}
        forms = {form for code in codes for form in (code, code.upper())}
        self._codes = np.array([int.from_bytes(form.encode(), "little") for form in sorted(forms)], np.uint16)

    def parse(self, batch: LineBatch, chosen: npt.NDArray[np.bool_]) -> ParsedBatch:
        """Return the documents of the lines of a mask, [lines]."""
        if self._load is None or not batch.contents:
            return self._parse_each(batch, chosen, set(range(len(batch.contents))))
        left = set(batch.too_long | self._repeated(batch))
        return (None if left or not chosen.all() else self._parse_all(batch)) or self._parse_each(batch, chosen, left)

    def _parse_all(self, batch: LineBatch) -> ParsedBatch | None:
        """Return the documents if every line has one that orjson can read; otherwise None."""
        assert self._load is not None
        try:
            entries = list(map(self._load, batch.contents))
            columns = [[entry[key] for entry in entries] for key in self.keys]
        except (ValueError, KeyError, TypeError):
            return None
        if not all(type(text) is str for column in columns for text in column):
            return None
        return ParsedBatch(columns, list(range(len(batch.contents))))

    def _parse_each(self, batch: LineBatch, chosen: npt.NDArray[np.bool_], left: AbstractSet[int]) -> ParsedBatch:
        """Return the documents; `left`: lines that orjson must not read."""
        parsed = ParsedBatch([[] for _ in self.keys])
        for row in np.flatnonzero(chosen).tolist():
            try:
                texts = None if row in left else self._parse_one(batch.contents[row])
                texts = texts or parse_line(batch.line(row), self.keys)
            except BadLineError as error:
                parsed.bad.append((row, str(error)))
                continue
            if texts is None:
                parsed.blank += 1
                continue
            parsed.rows.append(row)
            for column, text in zip(parsed.texts, texts, strict=True):
                column.append(text)
        return parsed

    def _parse_one(self, content: bytes) -> list[str] | None:
        """Return the texts of a line if orjson can read it; otherwise None."""
        assert self._load is not None
        try:
            entry = self._load(content)
            texts = [entry[key] for key in self.keys]
        except (ValueError, KeyError, TypeError):
            return None
        return texts if all(type(text) is str for text in texts) else None

    def _repeated(self, batch: LineBatch) -> set[int]:
        """Return the lines in which a key may occur more than once, or escaped."""
        block = np.frombuffer(batch.block, np.uint8)
        found = [_occurrences(batch.block, block, name) for name in self._names]
        # Behind the name of a key is a colon, or white space before it.
        found = [at[_follows(block, at + len(name))] for at, name in zip(found, self._names, strict=True)]
        escapes = _occurrences(batch.block, block, b"\\u00")
        if len(escapes):
            digits = block[np.minimum(escapes[:, None] + np.array([4, 5]), len(block) - 1)]
            escapes = escapes[np.isin(digits[:, 0] | digits[:, 1].astype(np.uint16) << 8, self._codes)]
        if all(len(at) <= 1 for at in found) and not len(escapes):
            return set()
        lines = batch.contents if not batch.too_long else batch.block.split(b"\n")
        ends = np.cumsum(np.fromiter(map(len, lines), np.int64, len(lines)) + 1)
        repeated = set[int](np.searchsorted(ends, escapes, side="right").tolist())
        for at in found:
            counts = np.bincount(np.searchsorted(ends, at, side="right"))
            repeated.update(np.flatnonzero(counts > 1).tolist())
        return repeated


SEARCHED = 1 << 20
"""Bytes searched at once, which bounds memory."""

COLON_OR_SPACE = np.isin(np.arange(256), np.frombuffer(b": \t\r\n", np.uint8))


def _follows(block: npt.NDArray[np.uint8], at: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return whether a colon or white space, or nothing, is at each of the positions."""
    follows: npt.NDArray[np.bool_] = COLON_OR_SPACE[block[np.minimum(at, len(block) - 1)]] | (at >= len(block))
    return follows


def _occurrences(content: bytes, block: npt.NDArray[np.uint8], pattern: bytes) -> npt.NDArray[np.int64]:
    """Return the positions of a pattern of 3 bytes or more in `content`, of which `block` is an array.

    Pairs of bytes are compared as 16-bit numbers, at even and at odd positions, which is several times as fast as
    bytes.find. The last pair is looked for: in JSON, a quote within a text has a backslash before it.
    """
    pair, rest, places = int.from_bytes(pattern[-2:], "little"), len(pattern) - 2, [np.empty(0, np.int64)]
    for start in range(0, len(content), SEARCHED):
        for first in (start, start + 1):
            count = (min(len(content), start + SEARCHED + 1) - first) // 2
            if count > 0:
                at = 2 * np.flatnonzero(np.frombuffer(content, "<u2", count, first) == pair) + first - rest
                at = at[at >= 0]
                for offset in range(rest - 1, -1, -1):
                    at = at[block[at + offset] == pattern[offset]]
                places.append(at)
    return np.sort(np.concatenate(places))


def parse_plain(batch: LineBatch, chosen: npt.NDArray[np.bool_]) -> ParsedBatch:
    """Return the documents of plain text, each a line or a file; blank lines are left out, empty files are not."""
    parsed = ParsedBatch([[]])
    for row in np.flatnonzero(chosen).tolist():
        content = batch.contents[row].removeprefix(BOM)
        if row in batch.too_long:
            parsed.bad.append((row, "longer than --max-line-mb"))
            continue
        if batch.names is None:
            content = content.removesuffix(b"\r")
            if not content.strip():
                parsed.blank += 1
                continue
        try:
            parsed.texts[0].append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            parsed.bad.append((row, f"not UTF-8 at byte {error.start}"))
            continue
        parsed.rows.append(row)
    return parsed


def parse_line(line: Line, keys: Sequence[str]) -> list[str] | None:
    """Return the texts under `keys` of one JSON line; None for a blank line.

    Raises:
        BadLineError: the line is not UTF-8 or JSON, not an object, or has no text under one of the keys.
    """
    entry = parse_object(line)
    return None if entry is None else [text_of(entry, key, line.content) for key in keys]


def parse_object(line: Line) -> dict[str, Any] | None:
    """Return the object of one JSON line; None for a blank line.

    Raises:
        BadLineError: the line is not UTF-8 or JSON, or not an object.
    """
    if line.too_long:
        raise BadLineError("longer than --max-line-mb")
    content = line.content
    content = content.removeprefix(BOM)
    if not content.strip():
        return None
    try:
        entry = DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")  # json's messages about strings end with " at"
        raise BadLineError(f"not JSON: {problem} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"unreadable JSON: {error}") from error
    if not isinstance(entry, dict):
        raise BadLineError(f"a JSON {type(entry).__name__} instead of an object")
    return entry


def value_of(entry: dict[str, Any], key: str) -> Any:
    """Return the value of a key.

    Raises:
        BadLineError: the object has no such key, or has it twice.
    """
    if isinstance(entry, _DuplicateKeys) and entry.names[key] > 1:
        raise BadLineError(f"key {key!r} twice")
    if key not in entry:
        raise BadLineError(f"no key {key!r} (it has {', '.join(map(repr, list(entry)[:8])) or 'none'})")
    return entry[key]


def text_of(entry: dict[str, Any], key: str, content: bytes) -> str:
    """Return the text of a key.

    Args:
        entry: the object.
        key: the key.
        content: its line.

    Raises:
        BadLineError: the value is no text, or holds half of a surrogate pair.
    """
    text = value_of(entry, key)
    if not isinstance(text, str):
        raise BadLineError(f"the value of {key!r} is {'null' if text is None else type(text).__name__}, not a string")
    if b"\\u" in content and (half := SURROGATE.search(text)):
        raise BadLineError(f"half a surrogate pair in {key!r} at character {half.start() + 1}")
    return text


def lines_before(unit: Unit) -> int:
    """Return the number of lines of the unit's file before the unit, by reading the file again (for errors only)."""
    if not unit.start:
        return 0
    count = 0
    with Path(unit.source.path).open("rb") as file:
        left = unit.start
        last = b""
        while left and (chunk := file.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
            last = chunk[-1:]
    return count + (last != b"\n")


def iterate_texts(
    inputs: Sequence[str],
    json_keys: Sequence[str] = ("text",),
    *,
    plain_text: PlainText | None = None,
    sample: Sample | None = None,
    max_bytes: int | None = None,
    skip_bad: bool = False,
) -> Iterator[str]:
    """Yield the texts under `json_keys` of every document, for tokenizer training.

    Args:
        inputs: paths and globs.
        json_keys: keys of the texts.
        plain_text: form of the documents of files that are plain text; None: files are JSON lines.
        sample: random choice of files and documents; None: all.
        max_bytes: stop after this many bytes of lines and files; None: read all.
        skip_bad: leave out lines without a document.

    Raises:
        DataError: an input is missing or damaged, or a line holds no document (without `skip_bad`).
    """
    sources, sample = find_sources(inputs, plain_text), sample or Sample()
    units = sample.units(plan_units(sources, unit_bytes=1 << 62))
    parser, draws, left = BatchParser(json_keys), np.random.PCG64(sample.seed), max_bytes
    for unit in units:
        for batch in read_batches(unit, json_keys):
            chosen = draws.random_raw(len(batch.contents)) < sample.documents * 2.0**64
            if left is not None:
                sizes = np.fromiter(map(len, batch.contents), np.int64, len(batch.contents)) + 1
                read = np.cumsum(sizes * chosen)
                chosen &= read <= left
                left -= int(read[-1]) if len(read) else 0
            parsed = parser.parse(batch, chosen) if unit.source.document == "json" else parse_plain(batch, chosen)
            if parsed.bad and not skip_bad:
                row, reason = parsed.bad[0]
                place = batch.names[row] if batch.names else f"{unit.source.path}:{batch.first + row}"
                kind = "file" if batch.names else "line"
                raise DataError(
                    f"Bad {kind} {place}: {reason}",
                    fix=remedy_of_bad(unit.source, kind),
                )
            for texts in zip(*parsed.texts, strict=True):
                yield from texts
            if left is not None and left < 0:
                return


@dataclass(frozen=True)
class Sample:
    """Random choice of the documents that a tokenizer is trained on.

    Attributes:
        files: number of files to read, of those given and of those in folders; None: all. An archive is one file.
        documents: share of the documents of these files.
        seed: seed of the choice.
    """

    files: int | None = None
    documents: float = 1.0
    seed: int = 1234

    def units(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units, one for each input, with the chosen files."""
        counts = [len(unit.paths) for unit in units]
        if self.files is None or self.files >= sum(counts):
            return list(units)
        chosen = np.zeros(sum(counts), np.bool_)
        chosen[np.random.RandomState(self.seed).permutation(len(chosen))[: self.files]] = True
        kept = []
        for unit, mask in zip(units, np.split(chosen, np.cumsum(counts)[:-1]), strict=True):
            files = unit.files.split("\0")
            if mask.any():
                kept.append(replace(unit, files="\0".join(files[i] for i in np.flatnonzero(mask).tolist())))
        return kept
