"""Training job: assembles and trains a run, with automatic rollback after loss spikes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_lite.backend.agreement import broadcast_from_rank0, run_on_all_ranks
from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.config.layout import AXES, partitions
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import MegatronLiteError
from megatron_lite.lifecycle.exit_status import ExitRecord
from megatron_lite.lifecycle.stopping import Stop, way_on
from megatron_lite.metrics.reporter import metrics_path
from megatron_lite.metrics.rewind import rewind
from megatron_lite.runs.catalog import announced
from megatron_lite.runs.rollback import RollbackReport, roll_back
from megatron_lite.train.assemble import assembled, machine
from megatron_lite.train.loop import Run, evaluate_only, train
from megatron_lite.train.spike_report import GoingBack

_TURN = 5.0
"""Seconds that rank 0 looks at the folder's lock while the other ranks wait in a collective."""


def train_job(config: RunConfig, record: ExitRecord, *, started: float, backend: Backend | None = None) -> None:
    """Assembles the run and trains it; after a rollback, does so again on the same machine. --skip-train: evaluates it.

    Args:
        config: as the command line gives it.
        record: takes the folder's lock, and is told when training begins and why it ends.
        started: time.monotonic() when the job began.
        backend: the machine to run on, which stays open; None: one of its own.

    Raises:
        MegatronLiteError: as `assembled` and `train`.
    """
    with ExitStack() as stack:
        backend = backend or stack.enter_context(machine(config, record.abort))
        world = backend.new_group("world", partitions(AXES, config.parallel))
        _take_folder(record, world)
        while (back := _run_once(config, backend, record, started)) is not None:
            iteration = back.iteration
            record.begin(lambda iteration=iteration: iteration)  # type: ignore[misc]
            config = _go_back(config, back, world, record)


def _take_folder(record: ExitRecord, world: Group) -> None:
    """Takes the lock of the --save folder for the job; a collective call.

    Raises:
        CheckpointError: another job holds it, or the folder cannot be written to.
    """
    token: str | None = None
    try:
        # In turns: waiting for another machine's heartbeat may take longer than a collective may.
        while token is None:
            token = broadcast_from_rank0(world, lambda: record.attempt(_TURN))
    except MegatronLiteError:
        record.start(None)
        raise
    record.start(token)


def _run_once(config: RunConfig, backend: Backend, record: ExitRecord, started: float) -> GoingBack | None:
    with assembled(config, backend, record.lock) as run:
        trains = not config.training.skip_train
        record.begin(lambda: run.progress.iteration, run.state.failed_saves, trains=trains)
        stop = train(run, started=started) if trains else evaluate_only(run, started=started)
        run.reporter.message(stop.message)
        if run.going_back is None:
            if trains and (line := _way_on(run, stop)) is not None:
                run.reporter.message(line)
            record.end(stop.status, stop.message)
    return run.going_back


def _way_on(run: Run, stop: Stop) -> str | None:
    save = run.config.checkpoint.save
    saved = announced(Path(save)) if save else None
    return way_on(run.config, stop, run.progress.iteration, int(saved) if saved and saved.isdecimal() else None)


def _go_back(config: RunConfig, back: GoingBack, world: Group, record: ExitRecord) -> RunConfig:
    """Rolls the folder of --save back, and returns the config that goes on from there; a collective call."""
    root = Path(config.checkpoint.save)

    def roll_back_own() -> RollbackReport:
        if record.lock is not None:
            record.lock.verify(now=True)
        return roll_back(root, back.iteration, back.skip, automatic=True)

    report = broadcast_from_rank0(world, roll_back_own)
    path = metrics_path(config)
    # The rank that wrote the metrics cuts them: they may lie on its own host.
    cut = world.rank == world.size - 1 and path is not None
    run_on_all_ranks(world, lambda: rewind(path, back.iteration, report.aside) if cut and path is not None else None)
    checkpoint = replace(
        config.checkpoint, load=config.checkpoint.save, load_iteration=0, finetune=False, reset_progress=False
    )
    return replace(config, checkpoint=checkpoint)
