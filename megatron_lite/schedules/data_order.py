"""Data order across resumes: the sizes that determine it, stored in every checkpoint.

Megatron shuffles a dataset for the number of samples that a run asks for, and its cyclic sampler for the layout. If a
resumed run asked for another number, or had another layout, it would read the same text in another order and repeat
part of it. So the numbers that a run began with are saved with it. A run that is made longer keeps the order of what
it asked for before, as long as that lasts, and asks for more samples beyond; a shorter one reads fewer of them.
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
from megatron_lite.schedules.length import START, train_samples, valid_samples
from megatron_lite.schedules.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSegment:
    """Iterations of a run between two changes of what it reads, or of how much at a time.

    Attributes:
        iteration: finished iterations at its beginning.
        consumed: samples consumed at its beginning.
        train_requests: samples that the training data was asked for, rising: by the run's first job, and by each later
            one that needed more than all before it.
        valid_requests: the same for the validation data.
        cyclic_layout: (micro-batch size, data-parallel size) that the order of the cyclic sampler is made for: those of
            the run's first job; None: another sampler.
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
        """Return `config` with what the segment's jobs read: their batch, data, seed, replicas and skipped iterations.

        Raises:
            ConfigError: another version wrote the segment, with fields that this one does not know.
        """
        saved, parallel = self.config, config.parallel
        ranges = tuple((first, last) for first, last in saved["skip_iteration_ranges"])
        return replace(
            config,
            batch=from_record(BatchConfig, saved["batch"]),
            data=from_record(DataConfig, saved["data"]),
            runtime=replace(config.runtime, seed=saved["seed"]),
            parallel=replace(parallel, world_size=saved["dp"] * parallel.tp * parallel.pp),
            training=replace(config.training, skip_iteration_ranges=ranges),
        )


def extend_history(
    history: tuple[DataSegment, ...],
    config: RunConfig,
    progress: Progress = START,
    fingerprints: Mapping[str, str] | None = None,
) -> tuple[DataSegment, ...]:
    """Return the history of a run that goes on at `progress`; the last segment is what it reads from there on.

    Args:
        history: saved in the checkpoint; empty for a run that begins.
        config: the run's from now on.
        progress: the checkpoint's.
        fingerprints: of the data.
    """
    last = history[-1] if history else DataSegment()
    cyclic = config.data.sampler == "cyclic"
    # The cyclic sampler begins anew at the end of what it shuffles, however long the run is.
    fixed = config.training.skip_train or (cyclic and last.train_requests)
    current = DataSegment(
        iteration=progress.iteration,
        consumed=progress.consumed_train_samples,
        train_requests=last.train_requests
        if fixed
        else _extended(last.train_requests, train_samples(config, progress)),
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
    """Return the history of a run whose checkpoint holds none (an earlier version wrote it).

    It is as if all of the run had been read under the config of the job that saved it: that job's order is the one to
    keep. Fields that the config does not hold keep this run's value.

    Args:
        saved: the checkpoint's config, as JSON; one without these sections gives no history.
        current: this run's config.
    """
    if any(section not in saved for section in ("batch", "data", "training", "runtime", "parallel")):
        return ()
    parallel = {name: saved["parallel"][name] for name in ("world_size", "tp", "pp") if name in saved["parallel"]}
    config = replace(
        current,
        batch=_known(BatchConfig, saved["batch"], current.batch),
        data=_known(DataConfig, saved["data"], current.data),
        training=replace(_known(TrainingConfig, saved["training"], current.training), skip_train=False),
        runtime=replace(current.runtime, seed=saved["runtime"].get("seed", current.runtime.seed)),
        parallel=replace(current.parallel, **parallel),
    )
    return extend_history((), config)


def _extended(requests: tuple[int, ...], needed: int) -> tuple[int, ...]:
    return requests if needed <= max(requests, default=0) else (*requests, needed)


def _known(kind: type[T], saved: Mapping[str, Any], current: T) -> T:
    """A section of a saved config, without fields that this version does not know."""
    names = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    return from_record(kind, {**asdict(current), **{name: saved[name] for name in saved if name in names}})  # type: ignore[call-overload]
