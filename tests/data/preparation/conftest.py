"""Fixtures: a tiny tokenizer, unusual documents, and a reference implementation of Megatron's tools."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.run import preprocess
from megatron_lite.tokenizer.training import train_byte_level_bpe

TEXTS = [
    *(f"document {i} says the cat sat on mat number {i * 37 % 11}" for i in range(300)),
    "",
    "naïve 東京 🙂\n\n\tdon't",
    "<|endoftext|>",
    " ",
    "\u0000 and \u2028",
    "long " * 2000,
    "",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_byte_level_bpe(TEXTS, folder, vocab_size=320)
    return TokenizerConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Documents with two keys, ASCII and other lines, one blank line, no line break at the end."""
    lines = [
        json.dumps({"text": text, "title": f"title {i}" if i % 5 else ""}, ensure_ascii=i % 2 == 0)
        for i, text in enumerate(TEXTS)
    ]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join([*lines[:100], "  ", *lines[100:]]), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path, tokenizer, corpus):
    """Return a function that preprocesses into the test's folder and returns the output prefix."""

    def call(name="out", progress=None, **kwargs):
        settings = {"inputs": (str(corpus),), "unit_bytes": 3000, "tokenizer": tokenizer} | kwargs
        prefix = str(tmp_path / name)
        preprocess(PreprocessOptions(output_prefix=prefix, **settings), progress or ProgressDisplay())
        return prefix

    return call


@pytest.fixture(scope="session")
def look():
    """Return functions that read the output, and give the output of Megatron's tools."""
    return SimpleNamespace(files=files, documents=documents, original=original, bytes_of=bytes_of, texts=TEXTS)


def files(prefix, suffix="_text_document"):
    """Return the bytes of the three files."""
    return [Path(f"{prefix}{suffix}.{ending}").read_bytes() for ending in ("bin", "idx", "manifest.json")]


def documents(prefix, suffix="_text_document"):
    """Return the tokens of each document."""
    dataset = IndexedDataset(f"{prefix}{suffix}")
    dataset.check()
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def original(texts, encode, eod=None, keep_empty=False):
    """Return the documents that Megatron's tools write."""
    out = []
    for text in texts:
        ids = list(encode(text))
        if ids and eod is not None:
            ids.append(eod)
        if ids or keep_empty:
            out.append(ids)
    return out


def bytes_of(documents):
    """Return .bin and .idx of documents of one sequence each (or none), by the format's description."""
    sizes = [len(ids) for ids in documents if ids]
    ends = np.cumsum([bool(ids) for ids in documents])
    index = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08"
    index += len(sizes).to_bytes(8, "little") + (len(documents) + 1).to_bytes(8, "little")
    index += np.array(sizes, "<i4").tobytes()
    index += np.array(np.cumsum([0, *sizes[:-1]]) * 2, "<i8").tobytes()
    index += np.array([0, *ends], "<i8").tobytes()
    return [np.array([i for ids in documents for i in ids], "<u2").tobytes(), index]
