"""Data order state: sample counts per split and sampler settings, saved so that a resume keeps the order.

Megatron's shuffle depends on the number of samples that a run requests, and the order of its cyclic sampler on the
layout. A resumed run with another number or layout would read the data in another order and repeat part of it.
Therefore the initial values are saved in the checkpoint. A lengthened run keeps the order of the samples requested
before and requests further samples after them; a shortened run reads fewer of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig
from megatron_lite.config.record import from_record
from megatron_lite.config.run import RunConfig
from megatron_lite.config.training import TrainingConfig
from megatron_lite.schedules.length import START, train_requests, valid_samples
from megatron_lite.schedules.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSegment:
    """Segment of a run with constant data configuration.

    Attributes:
        iteration: finished iterations at the start of the segment.
        consumed: samples consumed at the start of the segment.
        train_requests: numbers of training samples requested, ascending: by the first job of the run, and by each later
            job that needed more than all jobs before.
        valid_requests: the same for the validation data.
        cyclic_layout: (micro-batch size, data-parallel size) that determine the order of the cyclic sampler: those of
            the first job of the run; None: another sampler.
        config: as JSON, the sections `batch` and `data`, and `seed`, `dp` and `skip_iteration_ranges`.
        fingerprints: of the data; empty where nothing is saved or loaded.
    """

    iteration: int = 0
    consumed: int = 0
    train_requests: tuple[int, ...] = ()
    valid_requests: tuple[int, ...] = ()
    cyclic_layout: tuple[int, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def apply_to(self, config: RunConfig) -> RunConfig:
        """Return `config` with the batch, data, seed, replicas and skipped iterations of this segment.

        Raises:
            ConfigError: the segment has fields of another version.
        """
        saved, parallel = self.config, config.parallel
        ranges = tuple((first, last) for first, last in saved["skip_iteration_ranges"])
        return replace(
            config,
            batch=from_record(BatchConfig, saved["batch"]),
            data=from_record(DataConfig, saved["data"]),
            runtime=replace(config.runtime, seed=saved["seed"]),
            parallel=replace(parallel, world_size=saved["dp"] * parallel.replica_size),
            training=replace(config.training, skip_iteration_ranges=ranges),
        )


def extend_history(
    history: tuple[DataSegment, ...],
    config: RunConfig,
    progress: Progress = START,
    fingerprints: Mapping[str, str] | None = None,
) -> tuple[DataSegment, ...]:
    """Return the history of a run that resumes at `progress`; its last segment describes the data from there on.

    Args:
        history: saved in the checkpoint; empty for a new run.
        config: configuration from `progress` on.
        progress: progress of the checkpoint.
        fingerprints: fingerprints of the data.
    """
    last = history[-1] if history else DataSegment()
    cyclic = config.data.sampler == "cyclic"
    # The cyclic sampler starts another pass at the end of its data, so its order does not depend on the run's length.
    fixed = config.training.skip_train or (cyclic and last.train_requests)
    current = DataSegment(
        iteration=progress.iteration,
        consumed=progress.consumed_train_samples,
        train_requests=last.train_requests
        if fixed
        else _extended(last.train_requests, *train_requests(config, progress)),
        valid_requests=_extended(last.valid_requests, valid_samples(config, progress)),
        cyclic_layout=(last.cyclic_layout or (config.batch.micro_batch_size, config.parallel.dp)) if cyclic else None,
        config={
            **json.loads(json.dumps({"batch": asdict(config.batch), "data": asdict(config.data)})),
            "seed": config.runtime.seed,
            "dp": config.parallel.dp,
            "skip_iteration_ranges": [list(ends) for ends in config.training.skip_iteration_ranges],
        },
        fingerprints=dict(fingerprints or {}),
    )
    if history and replace(current, iteration=last.iteration, consumed=last.consumed) == last:
        return history
    return (*history, current)


def history_of_config(saved: Mapping[str, Any], current: RunConfig) -> tuple[DataSegment, ...]:
    """Return the data history of a checkpoint written by a version that saved none.

    The configuration of the job that wrote the checkpoint is taken for the whole run. Fields missing there have their
    value in `current`.

    Args:
        saved: the configuration in the checkpoint, as JSON; without the sections read here, the history is empty.
        current: configuration of this run.
    """
    if any(section not in saved for section in ("batch", "data", "training", "runtime", "parallel")):
        return ()
    known = saved["parallel"]
    parallel = {"cp": 1, **{name: known[name] for name in ("world_size", "tp", "cp", "pp") if name in known}}
    config = replace(
        current,
        batch=_known(BatchConfig, saved["batch"], current.batch),
        data=_known(DataConfig, saved["data"], current.data),
        training=replace(_known(TrainingConfig, saved["training"], current.training), skip_train=False),
        runtime=replace(current.runtime, seed=saved["runtime"].get("seed", current.runtime.seed)),
        parallel=replace(current.parallel, **parallel),
    )
    return extend_history((), config)


def _extended(requests: tuple[int, ...], *needed: int) -> tuple[int, ...]:
    return (*requests, *(number for number in needed if number > max(requests, default=0)))


def _known(kind: type[T], saved: Mapping[str, Any], current: T) -> T:
    """Return a section of a saved configuration, without the fields of other versions."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    return from_record(kind, {**asdict(current), **{name: saved[name] for name in saved if name in names}})  # type: ignore[call-overload]
