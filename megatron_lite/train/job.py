"""Training job driver: start-up, training loop and shutdown of a run, restart after a loss spike's rollback."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.lifecycle.stopping import Rollback, Stop, resume_hint
from megatron_lite.metrics.rewind import rewind
from megatron_lite.runs.catalog import latest_iteration
from megatron_lite.runs.metrics_file import metrics_path
from megatron_lite.runs.rollback import RollbackReport, roll_back
from megatron_lite.train.assemble import assembled, machine
from megatron_lite.train.check_nodes import check_job_nodes
from megatron_lite.train.loop import evaluate_only, train
from megatron_lite.train.run_facts import Origin

_LOCK_TURN = 5.0
"""Seconds that rank 0 waits for the folder's lock while the other ranks wait in a collective."""


def train_job(
    config: RunConfig,
    record: ExitRecord,
    *,
    started: float,
    backend: Backend | None = None,
    command: Sequence[str] = (),
) -> None:
    """Assemble the run and train it (--skip-train: evaluate it); after a rollback, again on the same machine.

    Args:
        config: as the command line gives it.
        record: acquires the folder's lock, and records when training begins and why it ends.
        started: time.monotonic() when the job began.
        backend: the machine to run on, which stays open; None: a new one.
        command: the command line, to be recorded.

    Raises:
        MegatronLiteError: as `assembled` and `train`.
    """
    with ExitStack() as stack:
        notices = check_job_nodes(config) if config.runtime.check_nodes and backend is None else []
        backend = backend or stack.enter_context(machine(config.runtime, config.parallel, record.abort))
        world = backend.new_group("world", (tuple(range(backend.world_size)),))
        _acquire_lock(record, world)
        origin = Origin(command, started)
        while (rollback := _run_once(config, backend, record, started, notices, origin).rollback) is not None:
            iteration, origin = rollback.iteration, Origin(command, time.monotonic(), after_rollback=True)
            record.begin(lambda iteration=iteration: iteration)  # type: ignore[misc]
            config = _roll_back(config, rollback, world, record)


def _acquire_lock(record: ExitRecord, world: Group) -> None:
    """Acquire the lock of the --save folder for the job; a collective call.

    Raises:
        CheckpointError: another job holds it, or the folder cannot be written to.
    """
    token: str | None = None
    try:
        # In turns: waiting for another machine's heartbeat may take longer than the timeout of a collective.
        while token is None:
            token = broadcast_from_rank0(world, lambda: record.attempt(_LOCK_TURN))
    except MegatronLiteError:
        record.start(None)
        raise
    record.start(token)


def _run_once(
    config: RunConfig,
    backend: Backend,
    record: ExitRecord,
    started: float,
    notices: Sequence[str],
    origin: Origin,
) -> Stop:
    """Train until the run ends, stops or is to be rolled back; return why."""
    with assembled(config, backend, record.lock, origin) as run:
        for text in notices:
            run.reporter.message(text)
        trains = not config.training.skip_train
        record.begin(lambda: run.progress.iteration, run.state.failed_saves, trains=trains)
        stop = train(run, started=started) if trains else evaluate_only(run, started=started)
        run.reporter.message(stop.message)
        if stop.rollback is None:
            saved = latest_iteration(Path(config.checkpoint.save)) if config.checkpoint.save else None
            if trains and (hint := resume_hint(run.config, stop, run.progress.iteration, saved)) is not None:
                run.reporter.message(hint)
            record.end(stop.status, stop.message)
    return stop


def _roll_back(config: RunConfig, rollback: Rollback, world: Group, record: ExitRecord) -> RunConfig:
    """Roll the --save folder and the metrics back; return the config that resumes there. A collective call."""

    def roll_back_folder() -> RollbackReport:
        if record.lock is not None:
            record.lock.verify(now=True)
        return roll_back(Path(config.checkpoint.save), rollback.iteration, rollback.skip, automatic=True)

    report = broadcast_from_rank0(world, roll_back_folder)

    def truncate_metrics() -> None:
        # On the rank that wrote the metrics: they may be on its own host.
        if world.rank == world.size - 1 and (path := metrics_path(config)) is not None:
            rewind(path, rollback.iteration, report.aside)

    run_on_all_ranks(world, truncate_metrics)
    checkpoint = replace(
        config.checkpoint, load=config.checkpoint.save, load_iteration=0, finetune=False, reset_progress=False
    )
    return replace(config, checkpoint=checkpoint)
