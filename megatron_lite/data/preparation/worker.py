"""Preprocessing worker: tokenizes ranges of input files into dataset shards; writes shuffled buckets in order."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite import system_errors
from megatron_lite.data.format.index_format import smallest_token_type
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.preparation.batch import Batch, note_outliers
from megatron_lite.data.preparation.documents import BadLineError, lines_before, parse_line
from megatron_lite.data.preparation.lines import Line, read_lines
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.pool import Job
from megatron_lite.data.preparation.report import UnitReport
from megatron_lite.data.preparation.sentences import SentenceSplitter
from megatron_lite.data.preparation.shuffle import Bucket, sort_shard, write_bucket
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.data.preparation.work_folder import FinishedUnit, Shard, mark_finished, new_prefix
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer

BATCH_BYTES = 1 << 20
BATCH_LINES = 2000


Task = Unit | Bucket


class Step(NamedTuple):
    """Work since the last step: documents read, bytes of text, and bytes of the input file."""

    documents: int
    text_bytes: int
    input_bytes: int


def build_job(options: PreprocessOptions, folder: Path, tokenizer: Tokenizer | None = None) -> Job[Task, Step]:
    """Return the function that runs one task; in a worker process, `tokenizer` is built there."""
    worker = UnitWorker(options, tokenizer or build_tokenizer(options.tokenizer))

    def job(task: Task) -> Iterator[Step]:
        prefix = new_prefix(folder, task.number)
        try:
            if isinstance(task, Bucket):
                mark_finished(folder, task.number, FinishedUnit(write_bucket(task, prefix), UnitReport()))
                yield Step(0, 0, 0)
                return
            shards, report = yield from worker.run(task, prefix)
            if options.shuffle:
                shards = [_sort(shard) for shard in shards]
            mark_finished(folder, task.number, FinishedUnit(shards, report))
        except OSError as error:
            raise DataError(
                f"Cannot write to {folder}: {system_errors.reason(error)}",
                fix=f"{system_errors.remedy(error, folder, writing=True)}; then give the same command again: it "
                "continues where "
                "it stopped",
            ) from error

    return job


def _sort(shard: Shard) -> Shard:
    order = Path(f"{shard.name}.order")
    result = sort_shard(shard, np.fromfile(order, np.uint64))
    order.unlink()
    return result


@dataclass
class _Parsed:
    """Parsed documents that are not tokenized yet.

    Attributes:
        lines: [documents] line numbers.
        texts: [documents][JSON keys] texts.
        order: [documents] sort keys of the shuffle.
        seen: lines read.
        num_bytes: bytes read.
    """

    lines: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    seen: int = 0
    num_bytes: int = 0


class _Draws:
    """Random numbers of a unit, one of each kind per line: they depend only on seed, unit and line number."""

    def __init__(self, seed: int, unit: int) -> None:
        self._sample = np.random.PCG64(np.random.SeedSequence([seed, unit, 0]))
        self._order = np.random.PCG64(np.random.SeedSequence([seed, unit, 1]))

    def next(self) -> tuple[float, int]:
        """Return a number in [0, 1) for sampling, and a 64-bit sort key for the shuffle."""
        return float(self._sample.random_raw()) / 2.0**64, int(self._order.random_raw())


class UnitWorker:
    """Tokenizes units into shards; each process has one, since building a tokenizer takes a while."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.dtype = smallest_token_type(tokenizer.vocab_size)
        self.eod = tokenizer.eod if options.append_eod else None
        self.bos = tokenizer.bos if options.prepend_bos else None
        self.splitter = SentenceSplitter(options.language, options.keep_newlines) if options.split_sentences else None

    def run(self, unit: Unit, prefix: Path) -> Generator[Step, None, tuple[list[Shard], UnitReport]]:
        """Write the shards `{prefix}.{number of the JSON key}` of a unit, and with --shuffle `….order` next to each.

        Yields:
            Steps of progress.

        Returns:
            The shards and the report.

        Raises:
            DataError: the input is damaged, a line is bad (without --skip-bad-lines), or the disk is full.
        """
        report = UnitReport()
        names = [f"{prefix}.{i}" for i in range(len(self.options.json_keys))]
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(IndexedDatasetWriter(name, self.dtype)) for name in names]
            orders = [stack.enter_context(Path(f"{name}.order").open("wb")) for name in names if self.options.shuffle]
            before, checksums = 0, [0] * len(names)
            for parsed, position in self._batches(unit, report):
                for i, (batch, order) in enumerate(self._encode(parsed, unit, report)):
                    checksums[i] = writers[i].add_batch(batch.ids, batch.lengths, batch.sequences, checksums[i])
                    if orders:
                        orders[i].write(order.tobytes())
                yield Step(parsed.seen, parsed.num_bytes, position - before)
                before = position
        yield Step(0, 0, unit.num_bytes - before)  # a unit within one long line has no other step
        report.documents = writers[0].num_documents
        report.tokens = sum(writer.num_tokens for writer in writers)
        return [
            Shard(name, writer.num_bytes, checksum)
            for name, writer, checksum in zip(names, writers, checksums, strict=True)
        ], report

    def _batches(self, unit: Unit, report: UnitReport) -> Iterator[tuple[_Parsed, int]]:
        """Yield parsed documents in batches of bounded size, each with the position in the file."""
        parsed = _Parsed()
        draws = _Draws(self.options.seed, unit.number)
        draw = self.options.shuffle or self.options.sample is not None
        position = 0
        for line in read_lines(unit, self.options.json_keys, self.options.max_line_bytes):
            position = line.position
            if parsed.lines and parsed.num_bytes + len(line.content) > BATCH_BYTES:
                yield parsed, position
                parsed = _Parsed()
            parsed.seen += 1
            parsed.num_bytes += len(line.content)
            sample, order = draws.next() if draw else (0.0, 0)
            if self.options.sample is not None and sample >= self.options.sample:
                report.not_sampled += 1
            else:
                self._parse(line, order, parsed, unit, report)
            if parsed.seen == BATCH_LINES:
                yield parsed, position
                parsed = _Parsed()
        if parsed.seen:
            yield parsed, position

    def _parse(self, line: Line, order: int, parsed: _Parsed, unit: Unit, report: UnitReport) -> None:
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
            parsed.lines.append(line.number)
            parsed.texts.append(texts)
            parsed.order.append(order)

    def _encode(
        self, parsed: _Parsed, unit: Unit, report: UnitReport
    ) -> Iterator[tuple[Batch, npt.NDArray[np.uint64]]]:
        """Yield the documents to write and their sort keys, [documents], for each JSON key."""
        report.lines += parsed.seen
        report.text_bytes += parsed.num_bytes
        if not parsed.lines:
            return
        batches = self._tokenize(parsed, unit, report)
        if not parsed.lines:
            return
        kept = self._filter(batches, report)
        lines, order = np.array(parsed.lines)[kept], np.array(parsed.order, np.uint64)[kept]
        for key, batch in enumerate(batches):
            report.document_bytes += sum(
                _utf8_bytes(texts[key]) for texts, keep in zip(parsed.texts, kept, strict=True) if keep
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

    def _tokenize(self, parsed: _Parsed, unit: Unit, report: UnitReport) -> list[Batch]:
        """Return the tokens of all documents for each JSON key; a document that the tokenizer refuses is a bad line."""
        try:
            return [self._tokenize_key([texts[key] for texts in parsed.texts]) for key in self._keys]
        except DataError:
            for i in reversed(range(len(parsed.lines))):
                reason = self._refused_by_tokenizer(parsed.texts[i])
                if reason:
                    self._reject(parsed.lines[i], reason, unit, report)
                    del parsed.lines[i], parsed.texts[i], parsed.order[i]
            return [self._tokenize_key([texts[key] for texts in parsed.texts]) for key in self._keys]

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
        encoded = self.tokenizer.encode_flat([sentence for sentences in split for sentence in sentences])
        return Batch.of(encoded, np.fromiter(map(len, split), np.int64, len(split)))

    def _filter(self, batches: list[Batch], report: UnitReport) -> npt.NDArray[np.bool_]:
        """Return the mask of documents within --min-tokens and --max-tokens under every JSON key, [documents]."""
        tokens = [batch.document_tokens for batch in batches]
        few = np.logical_or.reduce([counts < self.options.min_tokens for counts in tokens])
        many = np.zeros_like(few)
        if self.options.max_tokens is not None:
            many = np.logical_or.reduce([counts > self.options.max_tokens for counts in tokens]) & ~few
        report.too_few_tokens += int(np.count_nonzero(few))
        report.too_many_tokens += int(np.count_nonzero(many))
        kept: npt.NDArray[np.bool_] = ~(few | many)
        return kept

    def _reject(self, number: int, reason: str, unit: Unit, report: UnitReport) -> None:
        if not self.options.skip_bad_lines:
            raise DataError(
                f"Bad line {unit.source.path}:{lines_before(unit) + number}: {reason}",
                fix="Repair the line, or pass --skip-bad-lines to leave out and count such lines",
            )
        report.reject(number, reason)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
