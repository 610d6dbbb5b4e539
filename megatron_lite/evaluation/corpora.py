"""Evaluation corpora in files: plain text, WikiText, Penn Treebank, enwik8, text8, and documents of JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.paths import suggest_path
from megatron_lite.config.text_file import require_text, text_lines
from megatron_lite.errors import DataError
from megatron_lite.evaluation.detokenizers import detokenize_penn_treebank, detokenize_wikitext, num_words
from megatron_lite.system_errors import reason, remedy

HUTTER_BYTES = 100_000_000
"""Size of the files enwik8 and text8."""
HUTTER_TEST_BYTES = 5_000_000
"""Size of their test split, the last twentieth."""
TEXT8_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")


@dataclass(frozen=True)
class Corpus:
    """Text to evaluate.

    Attributes:
        task: kind of corpus.
        name: path as given.
        text: text to tokenize.
        fingerprint: hash of the file's text, by which results of the same text are recognized.
        num_bytes: bytes by which bits per byte are normalized.
        num_words: words of the original text.
        num_characters: characters by which bits per character are normalized; None: not published for this corpus.
    """

    task: str
    name: str
    text: str
    fingerprint: str
    num_bytes: int
    num_words: int | None = None
    num_characters: int | None = None


def read_plain(path: str) -> Corpus:
    """Return a plain text file as one document.

    Raises:
        DataError: the file cannot be read, is empty, or holds JSON lines.
    """
    text = _read(path, "--text")
    if Path(path).suffix == ".jsonl":
        raise DataError(
            f"Cannot evaluate --text {path}: --text reads plain text, and this file is named as JSON lines",
            fix="Give the file with --documents (bits per byte of each document), or preprocess it with "
            "`megatron-lite preprocess` and give the dataset with --data-path",
        )
    return Corpus("text", path, text, fingerprint(text), len(text.encode()), len(text.split()))


def read_wikitext(path: str) -> Corpus:
    """Return a file of WikiText-2 or WikiText-103 (wiki.test.raw, wiki.test.tokens), detokenized.

    Raises:
        DataError: the file cannot be read or is not WikiText.
    """
    text = _read(path, "--wikitext")
    if " = " not in text:
        raise DataError(
            f"--wikitext {path} has no heading such as ' = Robert Boulter = ', so it is not WikiText",
            fix="Give wiki.test.raw or wiki.test.tokens of WikiText-2 or 103; other texts are given with --text",
        )
    return Corpus("wikitext", path, detokenize_wikitext(text), fingerprint(text), len(text.encode()), num_words(text))


def read_penn_treebank(path: str) -> Corpus:
    """Return a file of Mikolov's Penn Treebank (ptb.test.txt), detokenized.

    Raises:
        DataError: the file cannot be read, or is not the preprocessed Penn Treebank.
    """
    text = _read(path, "--ptb")
    if wrong := next((word for word in text.split() if word != "N" and word != word.lower()), ""):
        raise DataError(
            f"--ptb {path} has the word {wrong[:40]!r}; Mikolov's Penn Treebank is in lower case, except for N",
            fix="Give ptb.test.txt of simple-examples/data; other texts are given with --text",
        )
    return Corpus("ptb", path, detokenize_penn_treebank(text), fingerprint(text), len(text.encode()), num_words(text))


def read_enwik8(path: str) -> Corpus:
    """Return enwik8, whose characters are bytes; of the file of 100,000,000 bytes the test split, the last 5,000,000.

    Characters of several bytes that the split cuts are left out.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    return _of_hutter_prize("enwik8", path)


def read_text8(path: str) -> Corpus:
    """Return text8; of the file of 100,000,000 bytes the test split, the last 5,000,000.

    Raises:
        DataError: the file cannot be read, or has other characters than a to z and spaces.
    """
    corpus = _of_hutter_prize("text8", path)
    if others := sorted(set(corpus.text.rstrip("\n")) - TEXT8_CHARACTERS):
        raise DataError(
            f"--text8 {path} has the character {others[0]!r}; text8 consists of the letters a to z and spaces",
            fix="Give text8, or a part of it; other texts are given with --text, and enwik8 with --enwik8",
        )
    return corpus


READERS: Mapping[str, Callable[[str], Corpus]] = {
    "text": read_plain,
    "wikitext": read_wikitext,
    "ptb": read_penn_treebank,
    "enwik8": read_enwik8,
    "text8": read_text8,
}
"""Readers by flag, without the dashes."""


@dataclass(frozen=True)
class Document:
    """Document of JSON lines, with the name of its subset (Pile: meta.pile_set_name); empty: none."""

    text: str
    subset: str = ""


@dataclass(frozen=True)
class Documents:
    """Documents of one file, with the hash of its text."""

    name: str
    documents: tuple[Document, ...]
    fingerprint: str


def read_documents(path: str) -> Documents:
    """Return the documents of JSON lines with the key "text", as the Pile's files; they may be compressed.

    Raises:
        DataError: the file cannot be read, a line is not such an object, or there is no document.
    """
    text = _read(path, "--documents")
    documents = []
    for number, record in json_lines(text, path, "--documents"):
        meta = record.get("meta")
        subset = meta.get("pile_set_name", "") if isinstance(meta, Mapping) else ""
        if not isinstance(record.get("text"), str):
            raise DataError(
                f'--documents {path}, line {number}, has no string under the key "text"',
                fix='Give JSON lines such as {"text": "…"}, one document each',
            )
        if record["text"]:
            documents.append(Document(record["text"], str(subset)))
    if not documents:
        raise DataError(f"--documents {path} has no document with text", fix="Give a file with documents")
    return Documents(path, tuple(documents), fingerprint(text))


def json_lines(text: str, path: str, flag: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of JSON lines with their line numbers; empty lines are skipped.

    Raises:
        DataError: a line is not a JSON object.
    """
    found = []
    for number, line in enumerate(text_lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it is a {type(record).__name__}")
        except ValueError as error:
            raise DataError(
                f"{flag} {path}, line {number} ({line[:40]!r}) is not a JSON object: {error}",
                fix='Give JSON lines such as {"text": "…"}',
            ) from error
        found.append((number, record))
    return found


def fingerprint(text: str) -> str:
    """Return the first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: str, flag: str) -> str:
    text = require_text(path, flag)
    if not text:
        raise DataError(f"The file {flag} {path} is empty", fix=f"Give {flag} a file with text")
    return text


def _of_hutter_prize(task: str, path: str) -> Corpus:
    content = _read_bytes(path, f"--{task}")
    if len(content) == HUTTER_BYTES:
        content = content[-HUTTER_TEST_BYTES:]
    # A split of the file may begin and end within a character.
    first = next((at for at, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)
    text = content[first:].decode("utf-8", "replace")
    complete = text[:-1] if text.endswith("�") else text
    if "�" in complete:
        raise DataError(
            f"--{task} {path} is not UTF-8 text",
            fix=f"Give {task} itself, unpacked from {task}.zip, or its last 5,000,000 bytes",
        )
    size = len(complete.encode())
    return Corpus(task, path, complete, fingerprint(complete), size, num_characters=size)


def _read_bytes(path: str, flag: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        fix = (
            suggest_path(flag, path)
            if isinstance(error, FileNotFoundError)
            else remedy(error, path, instead=f"give another {flag}")
        )
        raise DataError(f"{flag} {path}: {reason(error)}", fix=fix) from error
    if not content:
        raise DataError(f"The file {flag} {path} is empty", fix=f"Give {flag} a file with text")
    return content
