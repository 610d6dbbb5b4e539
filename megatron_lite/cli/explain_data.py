"""Data report of `explain`: samples and epochs per split, number of evaluations, size of the sample indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lite.cli.data_position import saved_history
from megatron_lite.config.run import RunConfig
from megatron_lite.data.order.index_cache import index_folder, is_kept
from megatron_lite.data.order.sample_index import SAMPLE_BYTES
from megatron_lite.data.order.set_plan import SetPlan, describe_set
from megatron_lite.data.serving.build import cache_folder, plan_datasets
from megatron_lite.data.serving.dataset import short_names
from megatron_lite.errors import MegatronLiteError
from megatron_lite.formatting import format_size
from megatron_lite.schedules.data_order import DataSegment, extend_history
from megatron_lite.schedules.length import test_samples

SOURCES_SHOWN = 4
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}


def data_lines(config: RunConfig) -> Iterator[str]:
    """Yield the lines about the data of a run."""
    order, plans, problem = _planned(config)
    lines = [] if problem is None else list(_without_files(config, order, problem))
    for plan in plans:
        name = SPLIT_NAMES[plan.split] if plan.name == plan.split else f"{SPLIT_NAMES[plan.split]} {plan.name}"
        paths = [source.source.path for source in plan.sources]
        names = short_names(paths) if paths else ("random tokens",)
        lines.append(f"{name}: {describe_set(plan, names, SOURCES_SHOWN)}")
        lines += _index_lines(config, plan)
    for number, line in enumerate([*lines, _evaluations(config)]):
        yield f"{'Data' if not number else '':<12}{line}"


def data_record(config: RunConfig) -> list[dict[str, Any]]:
    """Return the same for --json: an entry for each dataset; none if the files are not on this machine."""
    return [
        {
            "split": plan.split,
            "name": plan.name,
            "samples": plan.size,
            "epochs": dict(zip([source.source.path for source in plan.sources], plan.epochs, strict=False)),
            "index_memory_bytes": max((index.build_bytes for index in plan.indices), default=0),
            "index_disk_bytes": sum(index.file_bytes for index in plan.indices if is_kept(index)),
        }
        for plan in _planned(config)[1]
    ]


def _planned(config: RunConfig) -> tuple[DataSegment, list[SetPlan], MegatronLiteError | None]:
    """Return the sample requests of the run, the plans of its datasets, and the error if they cannot be planned."""
    try:
        order = saved_history(config)[-1]
    except MegatronLiteError:  # the checkpoint is damaged: an error of a start, not of an explanation
        order = extend_history((), config)[-1]
    try:
        return order, [plan for sets in plan_datasets(config, order).values() for plan in sets.values()], None
    except MegatronLiteError as error:
        return order, [], error


def _without_files(config: RunConfig, order: DataSegment, problem: MegatronLiteError) -> Iterator[str]:
    """Yield the lines about datasets whose files cannot be opened."""
    evaluated = test_samples(config)
    asked = {"train": order.train_requests, "valid": order.valid_requests, "test": (evaluated,) if evaluated else ()}
    for split, requests in asked.items():
        if requests:
            yield f"{SPLIT_NAMES[split]}: {requests[-1]:,} samples"
    least = max((requests[-1] for requests in asked.values() if requests), default=0) * SAMPLE_BYTES
    memory = (
        f"the largest sample index takes at least {format_size(least)} of memory; " if config.data.has_index else ""
    )
    yield (
        f"{memory}epochs and documents are not counted, since the data cannot be opened here ({problem.description})"
    )


def _index_lines(config: RunConfig, plan: SetPlan) -> Iterator[str]:
    """Yield the memory and disk of a dataset's sample indices; nothing for small ones, which are not kept."""
    kept = [index for index in plan.indices if is_kept(index)]
    if not kept:
        return
    folders = sorted({str(index_folder(source.data, cache_folder(config.data))) for source in plan.sources})
    memory, disk = max(index.build_bytes for index in kept), sum(index.file_bytes for index in kept)
    yield (
        f"  the sample index takes {format_size(memory)} of memory while it is built, and {format_size(disk)} on disk "
        f"in {', '.join(folders[:SOURCES_SHOWN])}"
    )


def _evaluations(config: RunConfig) -> str:
    training = config.training
    if not training.eval_iters:
        return "no evaluation (--eval-iters 0)"
    batches = "1 batch" if training.eval_iters == 1 else f"{training.eval_iters:,} batches"
    every = f"every {training.eval_interval:,} iterations and " if training.eval_interval else ""
    return f"evaluated {every}at the end{'' if every else ' only'}, on {batches}"
