"""Unit of work for one worker: lines of a byte range to one shard per key and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from megatron_lite.data.format.index_format import smallest_token_type
from megatron_lite.data.preparation.batch import Batch
from megatron_lite.data.preparation.documents import BadLineError, lines_before, parse_line
from megatron_lite.data.preparation.lines import Line, read_lines
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.outliers import note_outliers
from megatron_lite.data.preparation.report import Report
from megatron_lite.data.preparation.sentences import SentenceSplitter
from megatron_lite.data.preparation.shard import Shard, ShardWriter
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import TokenBatch, Tokenizer

BATCH_BYTES = 1 << 20
BATCH_LINES = 2000


class Step(NamedTuple):
    """Work done since the last step: documents read, bytes of text, and bytes of the input file."""

    documents: int
    text_bytes: int
    input_bytes: int


@dataclass
class _Waiting:
    """Parsed documents that wait for the tokenizer: for each its line, its texts by key, its place in the shuffle."""

    lines: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    seen: int = 0
    num_bytes: int = 0


class _Draws:
    """A unit's random numbers, one of each kind a line, so that they depend on nothing but the seed and the place."""

    def __init__(self, seed: int, unit: int) -> None:
        self._sample = np.random.PCG64(np.random.SeedSequence([seed, unit, 0]))
        self._order = np.random.PCG64(np.random.SeedSequence([seed, unit, 1]))

    def next(self) -> tuple[float, int]:
        """A number in [0, 1) for sampling, and a 64-bit one for the order."""
        return float(self._sample.random_raw()) / 2.0**64, int(self._order.random_raw())


class UnitWorker:
    """Turns units into shards; one for each process, since building a tokenizer takes a while."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.dtype = smallest_token_type(tokenizer.vocab_size)
        self.eod = tokenizer.eod if options.append_eod else None
        self.bos = tokenizer.bos if options.prepend_bos else None
        self.splitter = SentenceSplitter(options.language, options.keep_newlines) if options.split_sentences else None

    def run(self, unit: Unit, prefix: Path, advance: Callable[[Step], None]) -> tuple[list[Shard], Report]:
        """Write a unit's shards `{prefix}.{number of the key}`; with --shuffle also `….order` beside each.

        Raises:
            DataError: the input is damaged, a line is bad (without --skip-bad-lines), or there is no room.
        """
        report = Report()
        names = [f"{prefix}.{i}" for i in range(len(self.options.json_keys))]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(ShardWriter(name, self.dtype)) for name in names]
            orders = [stack.enter_context(Path(f"{name}.order").open("wb")) for name in names if self.options.shuffle]
            before = 0
            for waiting, position in self._batches(unit, report):
                for i, (batch, order) in enumerate(self._encode(waiting, unit, report)):
                    writers[i].add_batch(batch.ids, batch.lengths, batch.sequences)
                    if orders:
                        orders[i].write(order.tobytes())
                advance(Step(waiting.seen, waiting.num_bytes, position - before))
                before = position
        advance(Step(0, 0, unit.num_bytes - before))  # a unit within one long line has no other step
        report.documents = writers[0].num_documents
        report.tokens = sum(writer.num_tokens for writer in writers)
        return [
            Shard(name, writer.num_bytes, writer.checksum) for name, writer in zip(names, writers, strict=True)
        ], report

    def _batches(self, unit: Unit, report: Report) -> Iterator[tuple[_Waiting, int]]:
        """Documents in batches that are large enough for the tokenizer and small enough for memory."""
        waiting = _Waiting()
        draws = _Draws(self.options.seed, unit.number)
        draw = self.options.shuffle or self.options.sample is not None
        position = 0
        for line in read_lines(unit, self.options.json_keys, self.options.max_line_bytes):
            position = line.position
            if waiting.lines and waiting.num_bytes + len(line.content) > BATCH_BYTES:
                yield waiting, position
                waiting = _Waiting()
            waiting.seen += 1
            waiting.num_bytes += len(line.content)
            sample, order = draws.next() if draw else (0.0, 0)
            if self.options.sample is not None and sample >= self.options.sample:
                report.not_sampled += 1
            else:
                self._parse(line, order, waiting, unit, report)
            if waiting.seen == BATCH_LINES:
                yield waiting, position
                waiting = _Waiting()
        if waiting.seen:
            yield waiting, position

    def _parse(self, line: Line, order: int, waiting: _Waiting, unit: Unit, report: Report) -> None:
        try:
            texts = parse_line(line, self.options.json_keys)
        except BadLineError as error:
            self._reject(line.number, str(error), unit, report)
            return
        if texts is None:
            report.blank += 1
        elif min(map(len, texts)) < self.options.min_chars:
            report.too_few_chars += 1
        else:
            waiting.lines.append(line.number)
            waiting.texts.append(texts)
            waiting.order.append(order)

    def _encode(self, waiting: _Waiting, unit: Unit, report: Report) -> Iterator[tuple[Batch, npt.NDArray[np.uint64]]]:
        """For each key the documents to write, and their places in the shuffle, [documents]."""
        report.lines += waiting.seen
        report.text_bytes += waiting.num_bytes
        if not waiting.lines:
            return
        batches = self._tokenize(waiting, unit, report)
        if not waiting.lines:
            return
        kept = self._filter(batches, report)
        lines, order = np.array(waiting.lines)[kept], np.array(waiting.order, np.uint64)[kept]
        for key, batch in enumerate(batches):
            report.document_bytes += sum(
                _utf8_bytes(texts[key]) for texts, keep in zip(waiting.texts, kept, strict=True) if keep
            )
            batch = batch.keep(kept)
            note_outliers(batch, lines.tolist(), self.tokenizer.unknown, report)
            if self.bos is not None:
                batch = batch.with_bos(self.bos)
            if self.eod is not None:
                batch = batch.with_eod(self.eod)
            filled = batch.sequences > 0
            report.empty += int(np.count_nonzero(~filled))
            keep = filled if self.options.empty_documents == "skip" else np.ones_like(filled)
            yield batch.keep(keep), order[keep]

    def _tokenize(self, waiting: _Waiting, unit: Unit, report: Report) -> list[Batch]:
        """For each key all waiting documents' tokens; a document that the tokenizer refuses is a bad line."""
        try:
            return [self._tokenize_key([texts[key] for texts in waiting.texts]) for key in self._keys]
        except DataError:
            for i in reversed(range(len(waiting.lines))):
                reason = self._refused_by_tokenizer(waiting.texts[i])
                if reason:
                    self._reject(waiting.lines[i], reason, unit, report)
                    del waiting.lines[i], waiting.texts[i], waiting.order[i]
            return [self._tokenize_key([texts[key] for texts in waiting.texts]) for key in self._keys]

    def _refused_by_tokenizer(self, texts: list[str]) -> str:
        try:
            for text in texts:
                self.tokenizer.encode(text)
        except DataError as error:
            return error.problem
        return ""

    @property
    def _keys(self) -> range:
        return range(len(self.options.json_keys))

    def _tokenize_key(self, texts: list[str]) -> Batch:
        if self.splitter is None:
            return Batch.of(self.tokenizer.encode_flat(texts), np.ones(len(texts), np.int64))
        split = [self.splitter.split(text) for text in texts]
        encoded: TokenBatch = self.tokenizer.encode_flat([sentence for sentences in split for sentence in sentences])
        return Batch.of(encoded, np.fromiter(map(len, split), np.int64, len(split)))

    def _filter(self, batches: list[Batch], report: Report) -> npt.NDArray[np.bool_]:
        """Which documents have as many tokens as asked for under every key, [documents]."""
        tokens = [batch.document_tokens for batch in batches]
        few = np.logical_or.reduce([counts < self.options.min_tokens for counts in tokens])
        many = np.zeros_like(few)
        if self.options.max_tokens is not None:
            many = np.logical_or.reduce([counts > self.options.max_tokens for counts in tokens]) & ~few
        report.too_few_tokens += int(np.count_nonzero(few))
        report.too_many_tokens += int(np.count_nonzero(many))
        kept: npt.NDArray[np.bool_] = ~(few | many)
        return kept

    def _reject(self, number: int, reason: str, unit: Unit, report: Report) -> None:
        if self.options.skip_bad_lines:
            report.reject(number, reason)
        else:
            _refuse(number, reason, unit)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _refuse(number: int, reason: str, unit: Unit) -> NoReturn:
    raise DataError(
        "Every line of the input is a document",
        found=f"{unit.source.path}:{lines_before(unit) + number}: {reason}",
        fix="Repair the line, or pass --skip-bad-lines to leave out such lines and count them",
    )
