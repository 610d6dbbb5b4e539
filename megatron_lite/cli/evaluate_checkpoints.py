"""Evaluation of checkpoints on rank 0: reads inputs, runs the jobs, records and prints the results."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lite.checkpoint.stored_model import stored_model
from megatron_lite.cli.curve import has_braille
from megatron_lite.cli.evaluate_arguments import CORPORA, flags_without_effect
from megatron_lite.cli.model_arguments import note
from megatron_lite.cli.output_file import write_output
from megatron_lite.cli.tokenizer_arguments import tokenizer_fields
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.formatting import format_count
from megatron_lite.runs.catalog import find_checkpoint, iteration_of, list_checkpoints
from megatron_lite.runs.evaluations import (
    Evaluation,
    append_evaluations,
    checkpoint_identity,
    job_key,
    read_evaluations,
)
from megatron_lite.runs.manifest import read_manifest
from megatron_lite.system_errors import reason

if TYPE_CHECKING:
    from megatron_lite.cli.evaluate_ranks import ModelRanks
    from megatron_lite.evaluation.harness import Generation
    from megatron_lite.evaluation.jobs import Job, ScoreSpans, Windows
    from megatron_lite.evaluation.scoring import Score, Span

HARNESS_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # lm_eval would fork this process, whose threads may hold locks.
    "DISABLE_MULTIPROC": "1",
}
"""Environment of lm-evaluation-harness: no network, no progress bars, no child processes."""


@dataclass
class EvaluationPlan:
    """Checkpoints and jobs.

    Attributes:
        checkpoints: in ascending order of iterations.
        jobs: for each checkpoint.
        ranks: the model, once it is there; tasks that generate text call it.
    """

    checkpoints: list[Path]
    jobs: list[Job]
    ranks: ModelRanks | None = None


def make_plan(options: argparse.Namespace) -> EvaluationPlan:
    """Find the checkpoints and read all inputs.

    Raises:
        MegatronLiteError: something is missing, or of another format.
    """
    if options.tasks:
        os.environ.update(HARNESS_VARIABLES)  # before the first import of libraries that read them once

    from megatron_lite.evaluation.jobs import Windows
    from megatron_lite.evaluation.scoring import check_length
    from megatron_lite.tokenizer.build import build_tokenizer

    plan = EvaluationPlan([], [])
    makers = _job_makers(options, plan)
    checkpoints = _checkpoints(options)
    path = checkpoints[-1]
    stored = stored_model(read_manifest(path), path)
    windows = [
        Windows(length, options.stride or length, options.prepend_bos, options.limit)
        for length in options.seq_length or [stored.seq_length]
    ]
    for one in windows:
        check_length(one.seq_length, stored.model)
    for flag, inputs in flags_without_effect(options).items():
        note(f"{flag} has no effect on {' and '.join(inputs)}")
    if options.prepend_bos:
        _ = build_tokenizer(replace(stored.tokenizer, **tokenizer_fields(options), fast=False)).bos
    plan.checkpoints = checkpoints
    plan.jobs = [make_job(one) for make_job in makers for one in windows]
    return plan


def evaluate_checkpoints(plan: EvaluationPlan, ranks: ModelRanks, options: argparse.Namespace) -> int:
    """Run the jobs on each checkpoint; record and print the results.

    Returns:
        0, or 1 if a checkpoint of several could not be loaded.
    """
    plan.ranks = ranks
    recorded: dict[tuple[str, str, str], Evaluation] = {}
    if options.all_checkpoints and not options.again:
        recorded = {one.key: one for one in read_evaluations(plan.checkpoints[0].parent)}
    results: list[Evaluation] = []
    failed = 0
    for path in plan.checkpoints:
        try:
            identity = checkpoint_identity(path)
            found = {job: recorded.get((identity, *job_key(job.task, _settings(job, options)))) for job in plan.jobs}
            missing = [job for job, known in found.items() if known is None]
            if missing:
                _load(ranks, path)
        except (CheckpointError, OSError) as error:
            if not options.all_checkpoints:
                raise
            note(f"skipped {path.name}: {error if path.exists() else 'it was deleted meanwhile'}")
            failed += path.exists()
            continue
        results += [found[job] or _measured(job, _settings(job, options), path, identity, ranks) for job in plan.jobs]
    _print(results, plan, options)
    return 1 if failed else 0


def _checkpoints(options: argparse.Namespace) -> list[Path]:
    load = options.load
    if not options.all_checkpoints:
        path = find_checkpoint(load, options.load_iteration, notify=note)
        if path is None:
            raise _no_checkpoint(load)
        return [path]
    if options.load_iteration or iteration_of(Path(load)) is not None:
        raise ConfigError(
            "--all-checkpoints evaluates all checkpoints of a run, and "
            + (f"--load-iteration {options.load_iteration}" if options.load_iteration else f"--load {load}")
            + " names a single one",
            fix="Remove --load-iteration, and give --load the --save folder of the run"
            if options.load_iteration
            else f"Give --load {Path(load).parent}, or remove --all-checkpoints",
        )
    found = list_checkpoints(Path(load))
    if not found:
        raise _no_checkpoint(load)
    return found


def _no_checkpoint(load: str) -> CheckpointError:
    return CheckpointError(
        f"--load {load} {'contains no checkpoint' if Path(load).is_dir() else 'does not exist'}",
        fix="Give --load the --save folder of a run, or the folder iter_… of one of its checkpoints",
    )


def _job_makers(options: argparse.Namespace, plan: EvaluationPlan) -> list[Callable[[Windows], Job]]:
    """Read the inputs; return for each a function that makes its job for given windows."""
    from megatron_lite.evaluation import jobs
    from megatron_lite.evaluation.corpora import READERS, read_documents
    from megatron_lite.evaluation.lambada import read_lambada

    makers: list[Callable[[Windows], Job]] = []
    for name in CORPORA:
        makers += [partial(jobs.corpus_job, READERS[name](path)) for path in getattr(options, name)]
    makers += [partial(jobs.dataset_job, prefix) for prefix in options.data_path]
    for path in options.lambada:
        passages = read_lambada(path)
        if lines := passages.without_word:
            note(
                f"--lambada {path}: {format_count(len(lines), 'passage')} of {len(passages.pairs):,} "
                f"{'ends' if len(lines) == 1 else 'end'} with punctuation instead of a word (first: line {lines[0]}), "
                "so the figures are not comparable with LAMBADA's"
            )
        makers.append(partial(jobs.lambada_job, passages))
    makers += [partial(jobs.documents_job, read_documents(path)) for path in options.documents]
    if names := [name for given in options.tasks for name in given.split(",") if name]:
        from megatron_lite.evaluation.harness import harness_job, load_tasks

        def generate(prompts: Sequence[Sequence[int]], generation: Generation) -> list[str]:
            assert plan.ranks is not None, "jobs are run with a model"
            return plan.ranks.generate(prompts, generation)

        tasks = load_tasks(names, options.include_path, options.num_fewshot, note)
        makers += [partial(harness_job, task, generate) for task in tasks]
    return makers


def _load(ranks: ModelRanks, path: Path) -> None:
    """Load a checkpoint, and say where."""
    model = ranks.load(path)
    try:
        _ = model.tokenizer.eod
    except DataError:
        note("the tokenizer has no end-of-document token: the first token of a text is not predicted")
    what = "the moving average of the weights of " if model.averaged else ""
    note(f"loaded {what}{model.path} (iteration {model.iteration}) on {model.stage.sharding.backend.device}")


def _settings(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a job, and which weights it evaluates if not those that were trained."""
    return {**job.settings, "weights": "moving average"} if options.ema else dict(job.settings)


def _measured(job: Job, settings: dict[str, Any], path: Path, identity: str, ranks: ModelRanks) -> Evaluation:
    """Run a job on the loaded checkpoint and record the result in the folder of the run."""
    found = job.measure(ranks.model.tokenizer, _with_progress(ranks, job))
    result = Evaluation(
        task=job.task,
        name=job.name,
        settings=settings,
        metrics=found.metrics,
        parts=found.parts,
        iteration=ranks.model.iteration,
        checkpoint=identity,
    )
    try:
        append_evaluations(path.parent, [result])
    except OSError as error:
        note(f"the result is not recorded in {path.parent}: {reason(error)}")
    return result


def _with_progress(ranks: ModelRanks, job: Job) -> ScoreSpans:
    """Return the function that scores spans, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def score(spans: Sequence[Span]) -> list[Score]:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        with Progress(
            *columns,
            TextColumn("tokens"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            task = bar.add_task(Path(job.name).name, total=sum(span.end - span.start for span in spans))
            return ranks.score(spans, lambda count: bar.advance(task, count))

    return score


def _print(results: Sequence[Evaluation], plan: EvaluationPlan, options: argparse.Namespace) -> None:
    from megatron_lite.evaluation.report import curves, format_checkpoints, format_results, json_record
    from megatron_lite.metrics.curve_svg import draw_svg
    from megatron_lite.metrics.curve_terminal import draw_terminal

    drawn = curves(results) if options.all_checkpoints else {}
    if options.json:
        records = [
            {
                "checkpoint": str(path),
                "iteration": iteration_of(path),
                "results": [json_record(one) for one in results if one.iteration == iteration_of(path)],
            }
            for path in plan.checkpoints
        ]
        print(json.dumps({"checkpoints": records} if options.all_checkpoints else records[0], indent=2))
    elif options.all_checkpoints:
        print(format_checkpoints(results))
        width = min(120, shutil.get_terminal_size().columns)
        for curve in drawn.values():
            print()
            print(draw_terminal(curve, width, unicode=has_braille(sys.stdout.encoding)), end="")
    else:
        print(format_results(results))
    if options.svg:
        for metric, curve in drawn.items():
            name = metric.replace("/", "-").replace(" ", "-")
            write_output(options.svg / f"{name}.svg", draw_svg(curve), "--svg")
        note(
            f"curves written to {options.svg}"
            if drawn
            else "no curve written: there is a single checkpoint, or no finite value"
        )
