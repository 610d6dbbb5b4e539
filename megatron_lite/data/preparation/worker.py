"""Preprocessing worker: tokenizes ranges of input files into dataset shards; writes shuffled buckets in order."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.data.format.index_format import smallest_token_type
from megatron_lite.data.format.indexed_writer import IndexedDatasetWriter
from megatron_lite.data.format.loss_mask import MASK_TYPE
from megatron_lite.data.preparation.answers import AnswerParser, segment_batch
from megatron_lite.data.preparation.batch import Batch, note_outliers
from megatron_lite.data.preparation.chat import read_template
from megatron_lite.data.preparation.documents import BatchParser, lines_before, parse_plain, remedy_of_bad
from megatron_lite.data.preparation.joining import ShortDocumentJoiner
from megatron_lite.data.preparation.lines import LineBatch, read_batches
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.pool import Job
from megatron_lite.data.preparation.report import UnitReport
from megatron_lite.data.preparation.sentences import SentenceSplitter
from megatron_lite.data.preparation.shuffle import Bucket, sort_shard, write_bucket
from megatron_lite.data.preparation.sources import Unit
from megatron_lite.data.preparation.work_folder import FinishedUnit, Shard, mark_finished, new_prefix, unwritable
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer

COMPARED = 1 << 16
"""Characters of the first documents of each process whose ids are compared with those of the tokenizer's library."""


@dataclass(frozen=True)
class UnitGroup:
    """Task: consecutive units that a worker writes to the same shards."""

    units: tuple[Unit, ...]

    @property
    def number(self) -> int:
        """Number of the first unit."""
        return self.units[0].number


Task = UnitGroup | Bucket
Text = str | tuple[str, ...]


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
                mark_finished(folder, {task.number: FinishedUnit(write_bucket(task, prefix), UnitReport())})
                yield Step(0, 0, 0)
                return
            units = yield from worker.write_shards(task.units, prefix)
            if options.shuffle:
                units = {number: _sorted(unit) for number, unit in units.items()}
            mark_finished(folder, units, sync=options.shuffle)
        except OSError as error:
            raise unwritable(folder, error) from error

    return job


def _sorted(unit: FinishedUnit) -> FinishedUnit:
    """Sort the shards of a unit, which has them to itself."""
    shards = []
    for shard in unit.shards:
        order = Path(f"{shard.name}.order")
        shards.append(sort_shard(shard, np.fromfile(order, np.uint64)))
        order.unlink()
    return FinishedUnit(shards, unit.report)


@dataclass
class _Documents:
    """Documents of a batch of lines that are not tokenized yet.

    Attributes:
        lines: [documents] line numbers, or numbers of files.
        files: [documents] paths, if they are files.
        texts: [JSON keys][documents] texts; of prompts with answers, one column of tuples of texts.
        order: [documents] sort keys of the shuffle; zeros without --shuffle.
    """

    lines: npt.NDArray[np.int64]
    files: list[str] | None
    texts: list[list[Text]]
    order: npt.NDArray[np.uint64]

    def keep(self, kept: npt.NDArray[np.bool_]) -> _Documents:
        """Return the documents of a mask, [documents]."""
        if kept.all():
            return self
        chosen = np.flatnonzero(kept).tolist()
        files = None if self.files is None else [self.files[i] for i in chosen]
        texts = [[column[i] for i in chosen] for column in self.texts]
        return _Documents(self.lines[kept], files, texts, self.order[kept])

    def file(self, index: int) -> str:
        """Return the path of a document that is a file; empty for a line."""
        return "" if self.files is None else self.files[index]


class _Draws:
    """Random numbers of a unit, one of each kind per line: they depend only on seed, unit and line number."""

    def __init__(self, seed: int, unit: int) -> None:
        self._sample = np.random.PCG64(np.random.SeedSequence([seed, unit, 0]))
        self._order = np.random.PCG64(np.random.SeedSequence([seed, unit, 1]))

    def next(self, lines: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]]:
        """Return numbers in [0, 1) for sampling, [lines], and 64-bit sort keys for the shuffle, [lines]."""
        return self._sample.random_raw(lines).astype(np.float64) / 2.0**64, self._order.random_raw(lines)


class UnitWorker:
    """Tokenizes units into shards; each process has one, since building a tokenizer takes a while."""

    def __init__(self, options: PreprocessOptions, tokenizer: Tokenizer) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.dtypes = dataset_types(options, tokenizer)
        self.ends = document_ends(options, tokenizer)
        self.parser = _parser_of(options)
        self._unchecked = COMPARED
        self.splitter = SentenceSplitter(options.language, options.keep_newlines) if options.split_sentences else None

    def write_shards(self, units: Sequence[Unit], prefix: Path) -> Generator[Step, None, dict[int, FinishedUnit]]:
        """Write units to the shards `{prefix}.{number of the dataset}`, and with --shuffle sort keys to `….order`.

        Yields:
            Steps of progress.

        Returns:
            The finished units by number.

        Raises:
            DataError: the input is damaged, a line is bad (without --skip-bad-lines), or the disk is full.
        """
        names, done = [f"{prefix}.{i}" for i in range(len(self.dtypes))], dict[int, FinishedUnit]()
        with contextlib.ExitStack() as stack:
            pairs = zip(names, self.dtypes, strict=True)
            writers = [stack.enter_context(IndexedDatasetWriter(name, dtype, synced=False)) for name, dtype in pairs]
            orders = [stack.enter_context(Path(f"{name}.order").open("wb")) for name in names if self.options.shuffle]
            for unit in units:
                finished = yield from self.run(unit, writers, orders)
                shards = [replace(shard, name=name) for shard, name in zip(finished.shards, names, strict=True)]
                done[unit.number] = FinishedUnit(shards, finished.report)
        return done

    def run(
        self, unit: Unit, writers: Sequence[IndexedDatasetWriter], orders: Sequence[BinaryIO] = ()
    ) -> Generator[Step, None, FinishedUnit]:
        """Append the documents of a unit to datasets and their sort keys to files, if there are any.

        Yields:
            Steps of progress.

        Returns:
            The unit, with shards without names.

        Raises:
            DataError: as in `write_shards`.
        """
        report, joiner = UnitReport(), self._new_joiner()
        before, checksums, draws = 0, [0] * len(writers), _Draws(self.options.seed, unit.number)
        extents = [writer.extent for writer in writers]

        def write(key: int, batch: Batch, order: npt.NDArray[np.uint64]) -> None:
            values = [batch.ids] if batch.answers is None else [batch.ids, batch.answers]
            for number, tokens in enumerate(values, key):
                checksum = writers[number].add_batch(tokens, batch.lengths, batch.sequences, checksums[number])
                checksums[number] = checksum
                if orders:
                    orders[number].write(order.tobytes())

        for lines in read_batches(unit, self.options.keys, self.options.max_line_bytes):
            documents = self._parse(lines, draws, unit, report)
            for key, (batch, counts, order) in enumerate(self._encode(documents, unit, report)):
                write(key, *((batch, order) if joiner is None else joiner.add(batch, counts, order)))
            yield Step(len(lines.contents), lines.num_bytes, lines.position - before)
            before = lines.position
        if joiner is not None:
            if (last := joiner.finish()) is not None:
                write(0, *last)
            report.joined, report.short = joiner.joined, joiner.short
        yield Step(0, 0, unit.num_bytes - before)  # a unit within one long line has no other step
        report.documents = writers[0].num_documents - extents[0].documents
        counts_of = [writer.num_tokens - extent.tokens for writer, extent in zip(writers, extents, strict=True)]
        report.tokens = counts_of[0] if self.options.has_answers else sum(counts_of)
        shards = [
            Shard("", count * writer.dtype.itemsize, checksum, writer.extent)
            for writer, count, checksum in zip(writers, counts_of, checksums, strict=True)
        ]
        return FinishedUnit(shards, report)

    def _new_joiner(self) -> ShortDocumentJoiner | None:
        if not self.options.join_short:
            return None
        return ShortDocumentJoiner(self.options.min_tokens, one_sequence=not self.options.split_sentences)

    def _parse(self, lines: LineBatch, draws: _Draws, unit: Unit, report: UnitReport) -> _Documents:
        """Return the documents of a batch of lines or files; the others are counted, or an error."""
        report.lines += len(lines.contents)
        report.files += len(lines.names or ())
        report.ignored += lines.ignored
        report.text_bytes += lines.num_bytes
        order = np.zeros(len(lines.contents), np.uint64)
        sampled = np.ones(len(lines.contents), np.bool_)
        if self.options.shuffle or self.options.sample is not None:
            sample, order = draws.next(len(lines.contents))
            sampled = sample < (self.options.sample if self.options.sample is not None else 1.0)
            report.not_sampled += int(np.count_nonzero(~sampled))
        parsed = self.parser.parse(lines, sampled) if unit.source.document == "json" else parse_plain(lines, sampled)
        for row, reason in parsed.bad:
            self._reject(lines.first + row, lines.names[row] if lines.names else "", reason, unit, report)
        report.blank += parsed.blank
        rows = np.array(parsed.rows, np.int64)
        files = None if lines.names is None else [lines.names[row] for row in parsed.rows]
        documents = _Documents(lines.first + rows, files, parsed.texts, order[rows])
        if self.options.min_chars:
            shortest = np.min([[sum(map(len, _parts(text))) for text in column] for column in parsed.texts], axis=0)
            report.too_few_chars += int(np.count_nonzero(shortest < self.options.min_chars))
            documents = documents.keep(shortest >= self.options.min_chars)
        return documents

    def _encode(
        self, documents: _Documents, unit: Unit, report: UnitReport
    ) -> Iterator[tuple[Batch, npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
        """Yield for each JSON key: documents to write, tokens of their texts and sort keys, [documents] each."""
        if not len(documents.lines):
            return
        self._compare_encoders(documents, unit)
        documents, batches = self._tokenize(documents, unit, report)
        if not len(documents.lines):
            return
        kept = self._filter(batches, report)
        documents = documents.keep(kept)
        for key, batch in enumerate(batches):
            report.document_bytes += sum(_utf8_bytes(part) for text in documents.texts[key] for part in _parts(text))
            batch = batch.keep(kept)
            note_outliers(batch, documents.lines, documents.files, self.tokenizer.unknown, report)
            counts = batch.document_tokens
            batch = batch.with_ends(*self.ends, self.dtypes[0])
            filled = batch.sequences > 0
            report.empty += int(np.count_nonzero(~filled))
            keep = filled if self.options.empty_documents == "skip" else np.ones_like(filled)
            yield batch.keep(keep), counts[keep], documents.order[keep]

    def _compare_encoders(self, documents: _Documents, unit: Unit) -> None:
        """Compare the ids of a fast encoder with the library's on the first documents of the process.

        Raises:
            DataError: they differ.
        """
        left = self._unchecked
        for i, columns in enumerate(zip(*documents.texts, strict=True)):
            if left <= 0:
                break
            texts = [part for text in columns for part in _parts(text)]
            left -= sum(map(len, texts))
            if sum(map(len, texts)) <= COMPARED and (difference := self.tokenizer.compare_encoders(texts)):
                place = documents.file(i) or f"{unit.source.path}:{lines_before(unit) + int(documents.lines[i])}"
                raise DataError(
                    f"Cannot encode {place} reliably: {difference}",
                    fix="Pass --no-fast-tokenizer, which encodes with the tokenizers library alone",
                )
        self._unchecked = left

    def _tokenize(self, documents: _Documents, unit: Unit, report: UnitReport) -> tuple[_Documents, list[Batch]]:
        """Return the tokens of the documents for each JSON key; one that the tokenizer refuses is a bad line."""
        try:
            return documents, [self._tokenize_key(column) for column in documents.texts]
        except DataError:
            reasons = [self._refused_by_tokenizer(texts) for texts in zip(*documents.texts, strict=True)]
            for i in reversed(range(len(reasons))):
                if reasons[i]:
                    self._reject(int(documents.lines[i]), documents.file(i), reasons[i], unit, report)
            documents = documents.keep(np.array([not reason for reason in reasons], np.bool_))
            return documents, [self._tokenize_key(column) for column in documents.texts]

    def _refused_by_tokenizer(self, texts: Sequence[Text]) -> str:
        try:
            for part in (part for text in texts for part in _parts(text)):
                self.tokenizer.encode(part)
        except DataError as error:
            return error.problem
        return ""

    def _tokenize_key(self, texts: list[Text]) -> Batch:
        split = [_parts(text) for text in texts]
        if self.splitter is not None:
            split = [tuple(self.splitter.split(text)) for (text,) in split]
        encoded = self.tokenizer.encode_flat([part for parts in split for part in parts])
        counts = np.fromiter(map(len, split), np.int64, len(split))
        return segment_batch(encoded, counts) if self.options.has_answers else Batch.of(encoded, counts)

    def _filter(self, batches: list[Batch], report: UnitReport) -> npt.NDArray[np.bool_]:
        """Return the mask of documents within --min-tokens and --max-tokens under every JSON key, [documents]."""
        tokens = [batch.document_tokens for batch in batches]
        least = 0 if self.options.join_short else self.options.min_tokens
        few = np.logical_or.reduce([counts < least for counts in tokens])
        many = np.zeros_like(few)
        if self.options.max_tokens is not None:
            many = np.logical_or.reduce([counts > self.options.max_tokens for counts in tokens]) & ~few
        report.too_few_tokens += int(np.count_nonzero(few))
        report.too_many_tokens += int(np.count_nonzero(many))
        kept: npt.NDArray[np.bool_] = ~(few | many)
        return kept

    def _reject(self, number: int, file: str, reason: str, unit: Unit, report: UnitReport) -> None:
        """Count a bad line or file, or raise it as an error."""
        if not self.options.skip_bad_lines:
            kind = "file" if file else "line"
            raise DataError(
                f"Bad {kind} {file or f'{unit.source.path}:{lines_before(unit) + number}'}: {reason}",
                fix=remedy_of_bad(unit.source, kind, "the command then continues where it stopped"),
            )
        report.reject(number, reason, file)


def dataset_types(options: PreprocessOptions, tokenizer: Tokenizer) -> list[np.dtype]:
    """Return the type of each dataset that is written: of tokens, and of the loss mask of answers."""
    tokens = smallest_token_type(tokenizer.vocab_size)
    return [tokens, MASK_TYPE] if options.has_answers else [tokens] * len(options.prefixes)


def first_token(options: PreprocessOptions, tokenizer: Tokenizer) -> int | None:
    """Return the token that begins every document, before a control code; None if there is none."""
    if options.prepend_eod:
        return tokenizer.eod
    return tokenizer.bos if options.prepend_bos else None


def document_ends(options: PreprocessOptions, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens before and after every document."""
    first = first_token(options, tokenizer)
    before = [] if first is None else [first]
    before += tokenizer.encode(options.control_code) if options.control_code else []
    return before, [tokenizer.eod] if options.append_eod else []


def _parser_of(options: PreprocessOptions) -> BatchParser | AnswerParser:
    if not options.has_answers:
        return BatchParser(options.keys)
    is_chat = options.input_format == "chat"
    template = read_template(options.tokenizer.model, options.chat_template) if is_chat else None
    return AnswerParser(options.keys, template)


def _parts(text: Text) -> tuple[str, ...]:
    """Return the texts that are tokenized one by one."""
    return (text,) if isinstance(text, str) else text


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
