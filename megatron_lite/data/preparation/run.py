"""Preprocessing run: plans units, starts workers, joins their shards into the final dataset."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lite.data.format import manifest as papers
from megatron_lite.data.format.index_format import idx_path, smallest_token_type
from megatron_lite.data.format.indexed_dataset import IndexedDatasetWriter
from megatron_lite.data.preparation.job import Task, build_job
from megatron_lite.data.preparation.options import PreprocessOptions
from megatron_lite.data.preparation.pool import Pool
from megatron_lite.data.preparation.progress import Progress
from megatron_lite.data.preparation.report import Summary
from megatron_lite.data.preparation.sentences import SentenceSplitter
from megatron_lite.data.preparation.shard import Shard
from megatron_lite.data.preparation.shuffle import plan_buckets
from megatron_lite.data.preparation.sources import Source, Unit, find_sources, plan_units, unit_size
from megatron_lite.data.preparation.work_folder import Done, WorkFolder, plan_hash
from megatron_lite.data.preparation.worker import Step
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.build import build_tokenizer

_Pool = Pool[Task, Step]


@dataclass(frozen=True)
class Result:
    """What a run made."""

    prefixes: tuple[str, ...]
    """The datasets, one for each key, as --data-path takes them."""
    summary: str
    """For people; empty if an earlier run had completed them."""


def preprocess(options: PreprocessOptions, progress: Progress) -> Result:
    """Make the datasets. Killed at any moment, the same call goes on and gives the same bytes.

    Raises:
        DataError: the input or the tokenizer is missing or damaged, a line is bad, or the output cannot be written.
    """
    sources = find_sources(options.inputs)
    units = plan_units(sources, options.unit_bytes, options.limit_bytes)
    with contextlib.closing(progress), _start_workers(options, min(options.workers, len(units))) as pool:
        run = _Run(options, sources, units, pool, progress)
        if run.is_complete():
            run.tidy_up()
            return Result(run.prefixes, "")
        run.refuse_to_overwrite()
        folder = WorkFolder(options.output_prefix, run.plan)
        try:
            summary = run.make(folder)
            folder.remove()
        finally:
            folder.release()
    return Result(run.prefixes, summary.text())


def _start_workers(options: PreprocessOptions, count: int) -> contextlib.AbstractContextManager[_Pool | None]:
    """Worker processes; none for one worker, which is this process.

    They start before anything else is done: they import and build their tokenizers while this process reads its own.
    """
    if count <= 1:
        return contextlib.nullcontext()
    return Pool(count, functools.partial(build_job, options, WorkFolder.path_of(options.output_prefix)))


class _Run:
    """One call's options and what follows from them."""

    def __init__(
        self,
        options: PreprocessOptions,
        sources: Sequence[Source],
        units: Sequence[Unit],
        pool: _Pool | None,
        progress: Progress,
    ) -> None:
        self.options = options
        self.sources = sources
        self.units = units
        self.pool = pool
        self.progress = progress
        # Where others encode, this process needs the vocabulary and not its fast encoder, the larger part of the wait.
        config = options.tokenizer if pool is None else replace(options.tokenizer, fast=False)
        self.tokenizer = tokenizer = build_tokenizer(config)
        self.prefixes = tuple(map(options.prefix, options.json_keys))
        self.about: dict[str, Any] = {
            "type": options.tokenizer.type,
            "fingerprint": tokenizer.fingerprint(),
            "rules": tokenizer.rules(),
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos if options.prepend_bos else None,
            "eod": tokenizer.eod if options.append_eod else None,
        }
        if options.split_sentences:
            self.about["punkt"] = SentenceSplitter(options.language, options.keep_newlines).fingerprint()
        self.plan = plan_hash(options, sources, self.about, unit_size(sources, options.unit_bytes))

    def is_complete(self) -> bool:
        """Whether an earlier run of the same plan made every dataset."""
        for prefix in self.prefixes:
            made = papers.read_manifest(prefix)
            if made is None or made.plan != self.plan:
                return False
            papers.check_files(prefix, made, contents=False)
        return True

    def tidy_up(self) -> None:
        """Remove what an interrupted removal left, but not the unfinished work of another command."""
        prefix = self.options.output_prefix
        if WorkFolder.path_of(prefix).is_dir() and WorkFolder.plan_of(prefix) in ("", self.plan):
            WorkFolder(prefix, self.plan).remove()

    def refuse_to_overwrite(self) -> None:
        """Leave alone what another command made.

        Raises:
            DataError: there is such a file, and --overwrite is not given.
        """
        if self.options.overwrite or WorkFolder.plan_of(self.options.output_prefix) == self.plan:
            return
        for prefix in self.prefixes:
            papers.refuse_to_replace(prefix)

    def make(self, folder: WorkFolder) -> Summary:
        """All the work; returns what was seen."""
        if folder.discarded:
            self.progress.say("Unfinished work of another command with this --output-prefix was thrown away.")
        units = self.units
        finished = set(folder.finished())
        todo = [unit for unit in units if unit.number not in finished]
        self.progress.start(_size(units), _size(todo), len(units) - len(todo))
        self._work(folder.path, todo, self.progress.advance)
        done = [folder.read(unit.number) for unit in units]
        summary = _summarise(self.sources, units, done)
        if not any(shard.num_bytes for one in done for shard in one.shards):
            raise DataError(
                "A dataset has tokens in it",
                found=summary.why_nothing(),
                fix="Give --input files with text under the key of --json-keys, or loosen the filters",
            )
        if self.options.shuffle:
            buckets = plan_buckets(len(units), [one.shards for one in done])
            rest = [bucket for bucket in buckets if bucket.number not in finished]
            self.progress.stage("shuffle", len(rest))
            self._work(folder.path, rest, lambda _: self.progress.piece())
            folder.drop([shard for one in done for shard in one.shards])
            done = [folder.read(bucket.number) for bucket in buckets]
        self.progress.stage("join", len(done) * len(self.prefixes))
        for key, prefix in enumerate(self.prefixes):
            self._join(prefix, [one.shards[key] for one in done], summary)
        return summary

    def _work(self, folder: Path, tasks: Sequence[Task], tell: Callable[[Step], None]) -> None:
        if self.pool is None:
            job = build_job(self.options, folder, self.tokenizer)
            for task in tasks:
                job(task, tell)
            return
        for step in self.pool.run(tasks):
            tell(step)

    def _join(self, prefix: str, shards: Sequence[Shard], summary: Summary) -> None:
        """Put shards end to end under the final name; the manifest comes last."""
        with IndexedDatasetWriter(prefix, smallest_token_type(self.tokenizer.vocab_size)) as writer:
            for shard in shards:
                writer.append(shard.name)
                self.progress.piece()
            papers.manifest_path(prefix).unlink(missing_ok=True)
        manifest = papers.Manifest(
            dtype=writer.dtype.name,
            documents=writer.num_documents,
            sequences=writer.num_sequences,
            tokens=writer.num_tokens,
            bin_pieces=[(shard.num_bytes, shard.checksum) for shard in shards],
            idx_pieces=papers.file_pieces(idx_path(prefix)),
            tokenizer=self.about,
            flags=self.options.identity(),
            inputs=[{"path": source.path, "bytes": source.num_bytes} for source in self.sources],
            plan=self.plan,
            report=summary.to_dict(),
        )
        papers.write_manifest(prefix, manifest)


def _size(units: Sequence[Unit]) -> int:
    return sum(unit.num_bytes for unit in units)


def _summarise(sources: Sequence[Source], units: Sequence[Unit], done: Sequence[Done]) -> Summary:
    """All reports as one, with places as file:line."""
    summary = Summary()
    lines = dict.fromkeys((source.path for source in sources), 0)
    for unit, one in zip(units, done, strict=True):
        path = unit.source.path
        summary.add(one.report, path, lines[path])
        lines[path] += one.report.lines
    summary.empty_inputs = [path for path, count in lines.items() if not count]
    return summary
