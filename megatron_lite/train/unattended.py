"""Trains to the end of a job, going back before a loss spike on the way where --auto-rollback allows it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_lite.backend.base import Backend
from megatron_lite.backend.group import Group
from megatron_lite.checkpoint.agreement import from_first, together
from megatron_lite.checkpoint.catalog import announced
from megatron_lite.checkpoint.rollback import roll_back
from megatron_lite.config.run import RunConfig
from megatron_lite.metrics.reporter import metrics_path
from megatron_lite.metrics.rewind import rewind
from megatron_lite.train.assemble import assembled, machine
from megatron_lite.train.exit_status import ExitRecord
from megatron_lite.train.loop import Run, train
from megatron_lite.train.spike_report import GoingBack
from megatron_lite.train.stopping import Stop, way_on


def train_job(config: RunConfig, record: ExitRecord, *, started: float, backend: Backend | None = None) -> Stop:
    """Assembles the run and trains it; after a rollback, does so again on the same machine.

    Args:
        config: as the command line gives it.
        record: told when the job has its ranks, and when training begins.
        started: time.monotonic() when the job began.
        backend: the machine to run on, which stays open; None: one of its own.

    Raises:
        MegatronLiteError: as `assembled` and `train`.
    """
    with ExitStack() as stack:
        backend = backend or stack.enter_context(machine(config))
        record.start()
        while True:
            stop, back, world = _train_once(config, backend, record, started)
            if back is None:
                return stop
            iteration = back.iteration
            record.begin(lambda iteration=iteration: iteration)  # type: ignore[misc]
            config = _go_back(config, back, world)


def _train_once(
    config: RunConfig, backend: Backend, record: ExitRecord, started: float
) -> tuple[Stop, GoingBack | None, Group]:
    with assembled(config, backend) as run:
        record.begin(lambda: run.progress.iteration, run.state.failed_saves)
        stop = train(run, started=started)
        run.reporter.message(stop.message)
        if run.going_back is None and (line := _way_on(run, stop)) is not None:
            run.reporter.message(line)
    return stop, run.going_back, run.mesh.world


def _way_on(run: Run, stop: Stop) -> str | None:
    save = run.config.checkpoint.save
    saved = announced(Path(save)) if save else None
    return way_on(run.config, stop, run.progress.iteration, int(saved) if saved and saved.isdecimal() else None)


def _go_back(config: RunConfig, back: GoingBack, world: Group) -> RunConfig:
    """Rolls the folder of --save back, and returns the config that goes on from there; a collective call."""
    root = Path(config.checkpoint.save)
    report = from_first(world, lambda: roll_back(root, back.iteration, back.skip, automatic=True))
    path = metrics_path(config)
    # The rank that wrote the metrics cuts them: they may lie on its own host.
    cut = world.rank == world.size - 1 and path is not None
    together(world, lambda: rewind(path, back.iteration, report.aside) if cut and path is not None else None)
    checkpoint = replace(
        config.checkpoint, load=config.checkpoint.save, load_iteration=0, finetune=False, reset_progress=False
    )
    return replace(config, checkpoint=checkpoint)
