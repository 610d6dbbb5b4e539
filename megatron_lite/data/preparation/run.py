"""Preprocessing run: plans units, runs workers, concatenates their shards into the final dataset."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from megatron_lite.data.format.loss_mask import remove_mask
from megatron_lite.data.format.manifest import is_complete, manifest_of, manifest_path, require_absent, write_manifest
from megatron_lite.data.preparation.assembly import Assembly
from megatron_lite.data.preparation.chat import read_template
from megatron_lite.data.preparation.lines import read_batches
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.pool import Pool
from megatron_lite.data.preparation.progress import ProgressDisplay
from megatron_lite.data.preparation.report import Summary
from megatron_lite.data.preparation.sentences import SentenceSplitter
from megatron_lite.data.preparation.shuffle import Bucket, plan_buckets
from megatron_lite.data.preparation.sources import Source, Unit, find_sources, plan_units, unit_size
from megatron_lite.data.preparation.work_folder import FinishedUnit, WorkFolder, plan_hash
from megatron_lite.data.preparation.worker import (
    Step,
    Task,
    UnitGroup,
    UnitWorker,
    build_job,
    dataset_types,
    first_token,
)
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.tokenizer.build import build_tokenizer

_Pool = Pool[Task, Step]

GROUP_BYTES = 32 << 20
"""Bytes of input after which a worker begins another shard; a larger unit is a shard of its own."""

GROUPS_PER_WORKER = 8
"""The next group has about this part, for each worker, of the input that is left: the last groups are small, so that
all workers end at about the same time."""

PROBED_LINES = 1000
"""Lines, at least, from which the mean size of a document is estimated."""


@dataclass(frozen=True)
class Result:
    """Result of a preprocessing run."""

    prefixes: tuple[str, ...]
    """The datasets, without loss masks, in the form that --data-path takes."""
    summary: str
    """Summary as text; empty if an earlier run had completed the datasets."""


def preprocess(options: PreprocessOptions, progress: ProgressDisplay) -> Result:
    """Tokenize the input into datasets. After an interruption the same call continues, with the same bytes as a result.

    Raises:
        DataError: the input or the tokenizer is missing or damaged, a line is bad, or the output cannot be written.
    """
    sources = find_sources(options.inputs, options.plain_text)
    _check_keys(options, sources)
    units = plan_units(sources, options.unit_bytes, options.limit_bytes)
    with (
        contextlib.ExitStack() as after_workers,  # which write to the work folder
        contextlib.closing(progress),
        _start_workers(options, min(options.workers, len(units))) as pool,
    ):
        run = _Run(options, sources, units, pool, progress)
        if all(is_complete(prefix, run.plan) for prefix in run.prefixes):
            # Delete what an interrupted deletion left, but keep unfinished work of another command.
            if WorkFolder.path_of(options.output_prefix).is_dir() and run.unfinished_plan in ("", run.plan):
                WorkFolder(options.output_prefix, run.plan).remove()
            return Result(options.data_prefixes, "")
        if not options.overwrite and run.unfinished_plan != run.plan:
            for prefix in run.prefixes:
                require_absent(prefix)
        summary = run.make(
            after_workers.enter_context(WorkFolder(options.output_prefix, run.plan, shuffle=options.shuffle))
        )
    return Result(options.data_prefixes, summary.text())


def _check_keys(options: PreprocessOptions, sources: Sequence[Source]) -> None:
    """Check that every source has a text for each JSON key."""
    plain = next((source for source in sources if source.document != "json"), None)
    if plain is not None and options.has_answers:
        raise ConfigError(
            f"--input-format {options.input_format} reads JSON lines; --input {plain.path} is plain text",
            fix=f"Give --input files of JSON lines, or preprocess {plain.path} without --input-format",
        )
    if plain is not None and len(options.json_keys) > 1:
        raise ConfigError(
            f"--json-keys {' '.join(options.json_keys)} names {len(options.json_keys)} texts of each document; "
            f"--input {plain.path} is plain text, with one",
            fix=f"Preprocess {plain.path} in a command of its own, with one key, which is part of the dataset's name",
        )


def _start_workers(options: PreprocessOptions, count: int) -> contextlib.AbstractContextManager[_Pool | None]:
    """Start worker processes; with one worker, the work is done in this process.

    They are started first, so that they import libraries and build their tokenizers while this process builds its own.
    """
    if count <= 1:
        return contextlib.nullcontext()
    return Pool(count, functools.partial(build_job, options, WorkFolder.path_of(options.output_prefix)))


class _Run:
    """Options of one call, and the values that follow from them."""

    def __init__(
        self,
        options: PreprocessOptions,
        sources: Sequence[Source],
        units: Sequence[Unit],
        pool: _Pool | None,
        progress: ProgressDisplay,
    ) -> None:
        self.options = options
        self.sources = sources
        self.units = units
        self.pool = pool
        self.progress = progress
        # With workers, this process needs only the vocabulary: building the fast encoder takes most of the time.
        config = options.tokenizer if pool is None else replace(options.tokenizer, fast=False)
        self.tokenizer = tokenizer = build_tokenizer(config)
        self.prefixes = options.prefixes
        self.tokenizer_entry: dict[str, Any] = {
            "type": options.tokenizer.type,
            "fingerprint": tokenizer.fingerprint(),
            "rules": tokenizer.rules(),
            "vocab_size": tokenizer.vocab_size,
            "bos": first_token(options, tokenizer),
            "eod": tokenizer.eod if options.append_eod else None,
        }
        if options.control_code:
            self.tokenizer_entry["control_code"] = options.control_code
        if options.input_format == "chat":
            template = read_template(options.tokenizer.model, options.chat_template)
            self.tokenizer_entry["chat_template"] = template.fingerprint
        if options.split_sentences:
            splitter = SentenceSplitter(options.language, options.keep_newlines)
            self.tokenizer_entry["punkt"] = splitter.fingerprint()
        self.plan = plan_hash(options, sources, self.tokenizer_entry, unit_size(sources, options.unit_bytes))
        self.unfinished_plan = WorkFolder.plan_of(options.output_prefix)

    def make(self, folder: WorkFolder) -> Summary:
        """Process all units, write the datasets, and return the summary."""
        if folder.discarded:
            self.progress.say("Unfinished work of another command with this --output-prefix was deleted.")
        finished = folder.finished()
        todo = [unit for unit in self.units if unit.number not in finished]
        self.progress.start(_size(self.units), _size(todo), len(self.units) - len(todo))
        if self.options.shuffle:
            return self._make_shuffled(folder, todo)
        with self._assemble(folder, self.units) as assembly:
            for step in self._add_units(assembly, todo):
                self.progress.advance(step)
            summary = self._summarize(folder, assembly.done)
            self._finish(assembly, summary)
        return summary

    def _make_shuffled(self, folder: WorkFolder, todo: Sequence[Unit]) -> Summary:
        for step in self._work(folder.path, self._groups(todo)):
            self.progress.advance(step)
        finished = folder.finished()
        done = [finished[unit.number] for unit in self.units]
        summary = self._summarize(folder, done)
        buckets = plan_buckets(len(self.units), [one.shards for one in done])
        rest = [bucket for bucket in buckets if bucket.number not in finished]
        self.progress.stage("shuffle", len(rest))
        for _ in self._work(folder.path, rest):
            self.progress.piece()
        folder.drop([shard for one in done for shard in one.shards])
        with self._assemble(folder, buckets) as assembly:
            self.progress.stage("join", len(buckets) - len(assembly.done))
            while count := assembly.append_finished():
                for _ in range(count):
                    self.progress.piece()
            self._finish(assembly, summary)
        return summary

    def _groups(self, todo: Sequence[Unit]) -> list[UnitGroup]:
        """Return tasks of consecutive units: few, since each costs some files, and enough for all workers.

        The shuffle sorts unit by unit.
        """
        groups, group, left = list[UnitGroup](), list[Unit](), _size(todo)
        for unit, following in zip_longest(todo, todo[1:]):
            group.append(unit)
            is_next = following is not None and following.number == unit.number + 1
            size = min(GROUP_BYTES, left // (GROUPS_PER_WORKER * self.options.workers))
            if self.options.shuffle or _size(group) >= size or not is_next:
                groups.append(UnitGroup(tuple(group)))
                left -= _size(group)
                group = []
        return groups

    def _assemble(self, folder: WorkFolder, tasks: Sequence[Unit | Bucket]) -> Assembly:
        numbers = [task.number for task in tasks]
        return Assembly(folder, numbers, self.prefixes, dataset_types(self.options, self.tokenizer))

    def _add_units(self, assembly: Assembly, todo: Sequence[Unit]) -> Iterator[Step]:
        """Append all units in order, as soon as they are finished, and yield the steps of the unfinished ones."""
        if self.pool is not None:
            for steps in self.pool.run(self._groups(todo)):
                yield from steps
                _append_finished(assembly)
            _append_finished(assembly)
            return
        worker = UnitWorker(self.options, self.tokenizer)
        while len(assembly.done) < len(self.units):
            if not assembly.append_finished():
                yield from assembly.write(worker, self.units[len(assembly.done)])

    def _work(self, folder: Path, tasks: Sequence[Task]) -> Iterator[Step]:
        """Run tasks in the workers or in this process, and yield their steps."""
        if self.pool is not None:
            return chain.from_iterable(self.pool.run(tasks))
        return chain.from_iterable(map(build_job(self.options, folder, self.tokenizer), tasks))

    def _summarize(self, folder: WorkFolder, done: Sequence[FinishedUnit]) -> Summary:
        """Return the summary of all units.

        Raises:
            DataError: they have no tokens; the command cannot continue.
        """
        summary = _summarize(self.sources, self.units, done)
        if not any(shard.num_bytes for one in done for shard in one.shards):
            folder.can_continue = False
            raise DataError(
                f"The dataset would be empty: {summary.explain_empty()}",
                fix=summary.remedy_of_empty(self.options.json_keys),
            )
        return summary

    def _finish(self, assembly: Assembly, summary: Summary) -> None:
        """Give the datasets their final names; the manifest is written last."""
        assembly.commit()
        if not self.options.has_answers:
            for prefix in self.prefixes:
                remove_mask(prefix)
        for key, writer in enumerate(assembly.writers):
            manifest_path(writer.prefix).unlink(missing_ok=True)
            writer.finish()
            manifest = manifest_of(
                writer,
                [(one.shards[key].num_bytes, one.shards[key].checksum) for one in assembly.done],
                self.tokenizer_entry,
                flags=self.options.identity(),
                inputs=[{"path": source.path, "bytes": source.num_bytes} for source in self.sources],
                plan=self.plan,
                report=summary.to_dict(),
            )
            write_manifest(writer.prefix, manifest)


def _append_finished(assembly: Assembly) -> None:
    while assembly.append_finished():
        pass


def _size(units: Sequence[Unit]) -> int:
    return sum(unit.num_bytes for unit in units)


def _summarize(sources: Sequence[Source], units: Sequence[Unit], done: Sequence[FinishedUnit]) -> Summary:
    """Return the sum of all reports, with line numbers of the files."""
    summary = Summary()
    lines = dict.fromkeys((source.path for source in sources), 0)
    for unit, one in zip(units, done, strict=True):
        path = unit.source.path
        summary.add(one.report, path, lines[path])
        lines[path] += one.report.lines
    summary.total.ignored += sum(source.listing.ignored for source in sources if source.listing is not None)
    summary.empty_inputs = [path for path, count in lines.items() if not count]
    return summary


def measure_worker_counts(
    options: PreprocessOptions, counts: Sequence[int], max_documents: int
) -> Iterator[tuple[int, int, float]]:
    """Preprocess about `max_documents` documents with each number of workers (--find-optimal-num-workers).

    Yields:
        Number of workers, bytes of input, and seconds of each run.
    """
    limit = _bytes_of(options, max_documents)
    for workers in counts:
        with tempfile.TemporaryDirectory() as folder:
            # The same units for every count, and enough of them for the largest.
            unit_bytes = max(1 << 16, limit // (4 * max(counts)))
            prefix = str(Path(folder) / "trial")
            started = time.monotonic()
            trial = replace(
                options, output_prefix=prefix, workers=workers, limit_bytes=limit, unit_bytes=unit_bytes, shuffle=False
            )
            preprocess(trial, ProgressDisplay())
            yield workers, limit, time.monotonic() - started


def _bytes_of(options: PreprocessOptions, documents: int) -> int:
    """Return the estimated bytes of input of a number of documents, from the first lines."""
    sources = find_sources(options.inputs, options.plain_text)
    total = sum(source.num_bytes for source in sources)
    for unit in plan_units(sources, unit_bytes=1 << 62):
        lines = 0
        for batch in read_batches(unit, options.keys):
            lines += len(batch.contents)
            if lines >= PROBED_LINES:
                break
        if lines:
            return max(1, min(total, batch.position * documents // lines))
    return max(1, total)
