"""Worker: batches, random draws, filters, rejected lines and the report of one unit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.preparation import lines as lines_module
from megatron_lite.data.preparation import worker as worker_module
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.sources import Source, Unit
from megatron_lite.data.preparation.worker import UnitWorker
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import Tokenizer

EOD = 300


class Bytes(Tokenizer):
    """Tokenizer of bytes that refuses exclamation marks, and records its batches."""

    vocab_size, eod = EOD + 1, EOD

    def __init__(self):
        self.batches = []

    def encode(self, text):
        if "!" in text:
            raise DataError("an exclamation mark", fix="Leave it out")
        return list(text.encode())

    def encode_flat(self, texts):
        self.batches.append(list(texts))
        return super().encode_flat(texts)

    def decode(self, ids):
        return bytes(ids).decode()

    def token(self, token_id):
        return chr(token_id)

    def fingerprint(self):
        return ""


@pytest.fixture
def work(tmp_path):
    """Return a function that runs a worker over lines (texts, dicts or bytes): worker, documents by key, report."""

    def run(*lines, number=0, **options):
        path = tmp_path / "input.jsonl"
        rows = [line if isinstance(line, bytes) else json.dumps(_document(line)).encode() for line in lines]
        path.write_bytes(b"\n".join(rows) + b"\n")
        size = path.stat().st_size
        chosen = PreprocessOptions(
            inputs=(str(path),), output_prefix=str(tmp_path / "out"), tokenizer=TokenizerConfig(), **options
        )
        worker = UnitWorker(chosen, Bytes())
        worker.steps = []
        worker.prefix = tmp_path / "shard"
        unit = Unit(number, Source(str(path), "text", size, 0), 0, size)
        done = run_to_end(worker.write_shards([unit], worker.prefix), worker.steps)[number]
        worker.shards, report = done.shards, done.report
        worker.num_bytes = size
        documents = []
        for key in range(len(chosen.json_keys)):
            data = IndexedDataset(tmp_path / f"shard.{key}")
            documents.append([data.document(place).tolist() for place in range(data.num_documents)])
        return worker, documents, report

    return run


def run_to_end(generator, steps):
    """Append what a generator yields to `steps`, and return its result."""

    def delegate():
        result.append((yield from generator))

    result = []
    steps.extend(delegate())
    return result[0]


def _document(line):
    return line if isinstance(line, dict) else {"text": line}


def texts(documents):
    return [bytes(token for token in ids if token != EOD).decode() for ids in documents]


def test_documents_are_written_in_order_and_counted(work):
    worker, (documents,), report = work("ab", "", "cde", append_eod=True)
    assert documents == [[97, 98, EOD], [99, 100, 101, EOD]]
    assert (report.lines, report.documents, report.tokens, report.empty, report.document_bytes) == (3, 2, 7, 1, 5)
    (shard,) = worker.shards
    assert (shard.name, shard.num_bytes) == (str(worker.prefix) + ".0", 7 * 2)
    assert not list(worker.prefix.parent.glob("*.order"))
    assert work("ab", append_eod=False)[1] == [[[97, 98]]]
    assert work("a", "", "b", empty_documents="keep")[1] == [[[97], [], [98]]]


def test_text_is_counted_in_utf_8_bytes(work):
    _, _, report = work("é", "東a")
    assert report.document_bytes == 2 + 4
    assert report.text_bytes == sum(len(json.dumps({"text": text}) + "\n") for text in ("é", "東a"))


def test_batches_end_with_the_line_that_reaches_their_size(work, monkeypatch):
    line = len(json.dumps({"text": "a"}) + "\n")
    monkeypatch.setattr(lines_module, "BATCH_BYTES", line + 1)
    worker, (documents,), _ = work("a", "b", "c", "d", "e")
    assert worker.tokenizer.batches == [["a", "b"], ["c", "d"], ["e"]]
    assert texts(documents) == ["a", "b", "c", "d", "e"]
    assert [step.documents for step in worker.steps] == [2, 2, 1, 0]
    monkeypatch.setattr(lines_module, "BATCH_BYTES", line)
    worker, _, _ = work("a", "b")
    assert worker.tokenizer.batches == [["a"], ["b"]]
    assert [(step.documents, step.text_bytes) for step in worker.steps] == [(1, line)] * 2 + [(0, 0)]


def test_steps_add_up_to_the_unit(work, monkeypatch):
    monkeypatch.setattr(lines_module, "BATCH_BYTES", 20)
    worker, _, report = work("a", "b", b"", "d", b"", b"")
    assert sum(step.input_bytes for step in worker.steps) == worker.num_bytes
    assert all(step.input_bytes >= 0 for step in worker.steps)
    assert sum(step.documents for step in worker.steps) == report.lines == 6
    assert sum(step.text_bytes for step in worker.steps) == report.text_bytes
    assert report.blank == 3


def test_blank_lines_are_not_tokenized(work):
    worker, (documents,), report = work(b"", b"", b"")
    assert (worker.tokenizer.batches, documents, report.blank, report.lines) == ([], [], 3, 3)


@pytest.mark.parametrize("rest", [("good",), ()])
def test_a_document_that_the_tokenizer_refuses_is_left_out(work, rest):
    _, (documents,), report = work("bad!", *rest, "worse!", skip_bad_lines=True)
    assert texts(documents) == list(rest)
    assert (report.bad, report.lines) == (2, 2 + len(rest))
    assert [(example.line, example.what) for example in report.bad_lines] == [
        (3 if rest else 2, "an exclamation mark"),
        (1, "an exclamation mark"),
    ]


def test_a_document_refused_under_one_key_is_left_out_of_all(work):
    lines = [{"text": "a", "title": "no!"}, {"text": "b", "title": "yes"}]
    _, documents, report = work(*lines, json_keys=("text", "title"), skip_bad_lines=True)
    assert [texts(of_key) for of_key in documents] == [["b"], ["yes"]]
    assert report.bad == 1


def test_a_bad_line_is_an_error_with_its_number(work):
    with pytest.raises(DataError, match=r"input\.jsonl:2: an exclamation mark"):
        work("a", "b!")
    with pytest.raises(DataError, match=r"input\.jsonl:3"):
        work("a", b"", b"{")


@pytest.mark.parametrize(
    ("options", "kept", "counts"),
    [
        ({"min_chars": 3}, ["abc", "abcd"], (2, 0, 0)),
        ({"min_tokens": 3}, ["abc", "abcd"], (0, 2, 0)),
        ({"max_tokens": 3}, ["a", "ab", "abc"], (0, 0, 1)),
        ({"max_tokens": 3, "min_tokens": 3}, ["abc"], (0, 2, 1)),
        ({"max_tokens": 4, "min_tokens": 1}, ["a", "ab", "abc", "abcd"], (0, 0, 0)),
    ],
    ids=str,
)
def test_bounds_of_filters_are_inclusive(work, options, kept, counts):
    _, (documents,), report = work("a", "ab", "abc", "abcd", append_eod=True, **options)
    assert texts(documents) == kept
    assert (report.too_few_chars, report.too_few_tokens, report.too_many_tokens) == counts
    assert report.document_bytes == sum(map(len, kept))


def test_filters_apply_to_every_key(work):
    lines = [{"text": "abc", "title": "a"}, {"text": "a", "title": "abcdef"}, {"text": "abc", "title": "abc"}]
    keys = {"json_keys": ("text", "title")}
    for options in ({"min_tokens": 2}, {"min_chars": 2}):
        _, documents, _ = work(*lines, **keys, **options)
        assert [texts(of_key) for of_key in documents] == [["abc"], ["abc"]]
    _, documents, report = work(*lines, **keys, min_tokens=2, max_tokens=5)
    assert [texts(of_key) for of_key in documents] == [["abc"], ["abc"]]
    assert (report.too_few_tokens, report.too_many_tokens) == (2, 0), "counted once, as too short"


def test_samples_depend_on_seed_unit_and_line(work):
    lines = [str(number) for number in range(200)]

    def drawn(**options):
        return texts(work(*lines, **options)[1][0])

    half = drawn(sample=0.5)
    assert drawn(sample=0.5) == half != drawn(sample=0.5, seed=1) != drawn(sample=0.5, number=1)
    assert 60 < len(half) < 140
    assert set(drawn(sample=0.25)) < set(half), "a smaller sample is a subset of a larger one"
    assert drawn(sample=1.0) == lines
    _, _, report = work(*lines, sample=0.5)
    assert report.not_sampled == 200 - len(half)
    # The draws of later lines do not depend on the content of a line.
    assert texts(work(b"", *lines[1:], sample=0.5)[1][0]) == [text for text in half if text != "0"]


def test_sort_keys_are_written_next_to_the_shard(work):
    def orders(*lines, **options):
        worker, _, _ = work(*lines, shuffle=True, **options)
        names = sorted(path.name for path in worker.prefix.parent.glob("shard.*.order"))
        return [np.fromfile(worker.prefix.parent / name, np.uint64).tolist() for name in names]

    (plain,) = orders("a", "b", "c", "d")
    assert len(set(plain)) == 4 and max(plain) > 2**32
    assert orders("a", "", "c", "d") == [[plain[0], *plain[2:]]], "an empty document has no key"
    assert orders("a", "x!", "c", "d", skip_bad_lines=True) == [[plain[0], *plain[2:]]]
    assert orders("a", "b", "c", "d", seed=5) != [plain]
    keyed = [{"text": "a", "title": "x"}, {"text": "b", "title": ""}]
    text, title = orders(*keyed, json_keys=("text", "title"))
    assert text == plain[:2] and title == plain[:1]


def test_draws_are_the_same_on_every_machine():
    """Shuffled and sampled datasets are reproducible: the draws of a seed and unit never change."""
    draws = worker_module._Draws(1234, 2)
    sample, order = draws.next(1)
    more, others = draws.next(1)
    assert [*sample, *more] == [0.838364010947949, 0.511052751597662]
    assert [*order.tolist(), *others.tolist()] == [9569277611926616451, 9831360783065826574]
    assert worker_module._Draws(1234, 2).next(2)[0].tolist() == [*sample, *more]


def test_a_document_whose_draw_equals_the_share_is_left_out(work, monkeypatch):
    monkeypatch.setattr(
        worker_module._Draws, "next", lambda self, lines: (np.full(lines, 0.5), np.zeros(lines, np.uint64))
    )
    assert work("a", sample=0.5)[1] == [[]]
    assert work("a", sample=0.51)[1] == [[[97]]]


def test_outliers_are_reported_with_their_line(work):
    _, _, report = work("a", "abc", "ab")
    assert [(example.line, example.score) for example in report.longest] == [(2, 3.0)]


def test_sentences_become_sequences(work, monkeypatch, tmp_path):
    class Splitter:
        def __init__(self, language, keep_newlines):
            assert (language, keep_newlines) == ("english", False)

        def split(self, text):
            return text.split()

    monkeypatch.setattr(worker_module, "SentenceSplitter", Splitter)
    _, (documents,), report = work("a bc", "", "d", split_sentences=True, append_eod=True)
    assert documents == [[97, 98, 99, EOD], [100, EOD]] and report.empty == 1
    assert len(IndexedDataset(tmp_path / "shard.0")) == 3
