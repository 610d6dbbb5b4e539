"""Run assembly: builds and connects model, data, optimizer, pipeline, checkpoints and metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_lite.backend.base import Backend
from megatron_lite.backend.select import select_backend
from megatron_lite.backend.warnings_once import warnings_once
from megatron_lite.config.counts import parameter_count
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.data.serving.build import build_datasets
from megatron_lite.data.serving.dataset import Dataset
from megatron_lite.data.serving.loader import Loader
from megatron_lite.lifecycle.failure import OnAbort, report_failures
from megatron_lite.metrics.report import RunFacts
from megatron_lite.metrics.reporter import Reporter, build_reporter
from megatron_lite.metrics.throughput import Throughput
from megatron_lite.metrics.timers import Timers
from megatron_lite.model.count_check import check_count
from megatron_lite.model.gpt import DTYPES, GPTStage, shared_stages
from megatron_lite.optim.optimizer import Optimizer
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.gemm import DeferredWeightGradients
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.shared import rank_parameters, shared_parameters
from megatron_lite.pipeline.executor import Executor, Messages
from megatron_lite.runs.comparison import continue_history, read_history
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.manifest import Provenance
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size
from megatron_lite.schedules.length import last_iteration
from megatron_lite.schedules.pipeline import SPLIT_BACKWARD, Action, rank_of_stage
from megatron_lite.schedules.progress import Progress
from megatron_lite.schedules.skipping import Ranges
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.train.batches import RunData
from megatron_lite.train.comparison import compare_runs, open_files
from megatron_lite.train.data_changes import effect_of_other_data, kept_order
from megatron_lite.train.introduction import introduction
from megatron_lite.train.loop import Run
from megatron_lite.train.native import NativeEngine
from megatron_lite.train.provenance import provenance_of
from megatron_lite.train.start import Start, check_provenance, find_start, load_start, settle_config
from megatron_lite.train.state import RunState


@contextmanager
def machine(config: RunConfig, on_abort: OnAbort | None = None) -> Iterator[Backend]:
    """This rank's device and its connections to the other ranks, closed on leaving.

    Args:
        config: the run.
        on_abort: called before another rank's failure ends this process from a thread; see report_failures.

    Raises:
        ConfigError: it cannot do what is asked.
    """
    with ExitStack() as stack:
        backend = select_backend(config.runtime, config.parallel)
        stack.callback(backend.shutdown)
        stack.enter_context(report_failures(backend, config.parallel, on_abort))
        stack.enter_context(warnings_once(backend))
        yield backend


@contextmanager
def assembled(config: RunConfig, backend: Backend | None = None, lock: FolderLock | None = None) -> Iterator[Run]:
    """Builds a run and loads what it starts from; on leaving, waits for the last save and frees everything.

    Args:
        config: as the command line gives it: the vocabulary's size is still the tokenizer's to say.
        backend: the machine to run on, which stays open; None: one of its own.
        lock: of the folder of --save, where this rank holds it; checked before anything is written there.

    Raises:
        ConfigError: the machine cannot do what is asked, or a file is missing.
        RankDifferenceError: the ranks do not have the same configuration, code or files.
        DataError: a dataset or tokenizer is damaged.
        CheckpointError: so is what --load names, or it belongs to another run.
    """
    with ExitStack() as stack:
        backend = backend or stack.enter_context(machine(config))
        # Before the mesh: ranks that disagree about its sizes would wait for each other in vain.
        reads_data = compare_runs(config, backend)
        mesh = build_mesh(backend, config.parallel)
        # The last rank has the loss, so it reports, as in Megatron.
        reporter = stack.enter_context(
            build_reporter(config, sys.stdout, active=mesh.world.rank == mesh.world.size - 1)
        )
        tokenizer, fingerprints = open_files(config, backend, reads_data=reads_data and _needs_fingerprints(config))
        for text in backend.take_warnings():
            reporter.message(f"WARNING: {text}")
        config = with_vocabulary(_with_absolute_paths(config), tokenizer.vocab_size)
        start = find_start(config, reporter.message, mesh.world)
        config = settle_config(config, start, reporter.message)
        # Data before the model: what is wrong with it shows before gigabytes are allocated.
        with backend.phases.enter("opening the data"):
            data = _open_data(config, backend, mesh, tokenizer, start)
        stack.callback(data.close)
        fingerprints = mesh.world.all_gather_object(fingerprints)[0]
        prints = {name: value for name, value in fingerprints.items() if name != "tokenizer"}
        history = continue_history(start.continued(config), config, prints)
        provenance = provenance_of(config, fingerprints, history)
        _compare_data(start, config, provenance, data, reporter)
        timers = Timers(config.metrics.timing_log_level, backend.synchronize)
        num_sources = len(data.train.names) if data.train is not None else 0
        with backend.phases.enter("building the model"):
            engine = build_engine(config, mesh, num_sources=num_sources, timers=timers)
        if (found := start.continued(config)) is not None and found.provenance.skipped_samples:
            provenance = replace(provenance, skipped_samples=found.provenance.skipped_samples)
            _leave_out(data, provenance.skipped_samples, reporter)
        found_path = start.path
        with backend.phases.enter("loading"):
            start, progress = load_start(start, engine, config, reporter.message)
        if start.path != found_path:  # an earlier checkpoint, from which the run may need other samples
            with backend.phases.enter("opening the data"):
                data = _open_data(config, backend, mesh, tokenizer, start)
            stack.callback(data.close)
            if data.train is not None:
                data.train.skipped = provenance.skipped_samples
            history = continue_history(start.continued(config), config, prints)
            provenance = replace(provenance, data_history=history)
        state = stack.enter_context(RunState(config, mesh.world, provenance, start, reporter.message, lock))
        if (loaded := start.continued(config)) is not None and "spikes" in loaded.scalars:
            state.spikes.load(loaded.scalars["spikes"])
        peak = backend.peak_flops(DTYPES[config.precision.dtype])
        reporter.message(introduction(config, backend, data, start, progress))
        _tell(config, mesh, reporter, peak, progress)
        for text in data.warnings:  # metrics.jsonl records messages from here on
            reporter.message(f"WARNING: {text}")
        yield Run(
            config=config,
            mesh=mesh,
            engine=engine,
            data=data,
            state=state,
            reporter=reporter,
            timers=timers,
            throughput=Throughput(config.model, devices=mesh.world.size, peak_flops=peak),
            progress=progress,
        )


def build_engine(
    config: RunConfig,
    mesh: Mesh,
    *,
    num_sources: int = 0,
    trace: list[Action] | None = None,
    timers: Timers | None = None,
) -> NativeEngine:
    """This rank's stages with their buffers, optimizer and executor.

    Args:
        config: the run, its vocabulary's size filled in.
        mesh: this rank's groups.
        num_sources: data sources of a blend whose losses are reported one by one.
        trace: if given, every action of the executor is appended to it.
        timers: measure the parts of a step and, from their level 2 on, of a micro-batch; None: nothing does.
    """
    parallel = config.parallel
    rng = RngStreams(config.runtime.seed, mesh.backend, mesh.tp.rank)
    deferred = DeferredWeightGradients() if parallel.pipeline_schedule in SPLIT_BACKWARD else None
    layers = stage_layers(config.model, parallel, config.batch.seq_length)
    ranks = [rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage) for stage in range(len(layers))]
    stages = {
        stage: GPTStage(config, layers[stage], mesh, rng, deferred)
        for stage, rank in enumerate(ranks)
        if rank == mesh.pp.rank
    }
    for stage in stages.values():
        check_count(stage)
    shared = shared_parameters(shared_stages(config.model, len(layers)), ranks, mesh)
    buffers = ParameterBuffers(
        rank_parameters(stages, shared, mesh.pp.rank),
        dp=mesh.dp,
        tp=mesh.tp,
        shared=shared,
        bucket_megabytes=parallel.bucket_megabytes,
        shard=parallel.distributed_optimizer,
        overlap=parallel.overlap_grad_reduce,
    )
    if config.runtime.compile:
        for stage in stages.values():
            stage.compile()
    elif parallel.overlap_param_gather:
        buffers.overlap_gather(unit for stage in stages.values() for unit in stage.units)
    executor = Executor(
        stages,
        num_stages=len(layers),
        rng=rng,
        messages=Messages(mesh.pp, mesh.backend.device),
        accumulate=buffers.accumulate,
        deferred=deferred,
        trace=trace,
        timed=(lambda name: timers(name, 2)) if timers is not None else None,
    )
    optimizer = Optimizer(config, buffers, mesh)
    return NativeEngine(config, mesh, stages, buffers, optimizer, executor, num_sources, timers)


def _open_data(config: RunConfig, backend: Backend, mesh: Mesh, tokenizer: Tokenizer, start: Start) -> RunData:
    order = continue_history(start.continued(config), config)[-1]
    datasets = build_datasets(
        config, order, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint()
    )
    data, dp = config.data, config.parallel.dp
    needs_eod = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
    eod = tokenizer.eod if needs_eod else -1
    final = final_batch_size(config.batch, dp)

    def loader(dataset: Dataset, *, training: bool = False) -> Loader:
        return Loader(
            dataset,
            micro_batch=config.batch.micro_batch_size,
            global_batch=(lambda consumed: global_batch_size(config.batch, consumed, dp))
            if training
            else (lambda consumed: final),
            dp=dp,
            replica=mesh.dp.rank,
            prefetch=data.prefetch,
            cyclic_layout=order.cyclic_layout if training else None,
            repeats=not training,
        )

    return RunData(
        backend,
        data,
        eod,
        train=loader(datasets.train, training=True) if datasets.train is not None else None,
        valid={name: loader(dataset) for name, dataset in datasets.valid.items()},
        test={name: loader(dataset) for name, dataset in datasets.test.items()},
        plans=datasets.plans,
        warnings=datasets.notices.warnings,
    )


def _needs_fingerprints(config: RunConfig) -> bool:
    """Whether the data's fingerprints are compared with another node's or a checkpoint's, or saved."""
    return bool(config.parallel.world_size > 1 or config.checkpoint.save or config.checkpoint.load)


def _compare_data(start: Start, config: RunConfig, provenance: Provenance, data: RunData, reporter: Reporter) -> None:
    """Refuses what may not change between a checkpoint and the run that goes on from it, and says what is kept."""
    found, effect = start.continued(config), ""
    if found is not None and data.train_plan is not None:
        effect = effect_of_other_data(data.train_plan, found.scalars["progress"]["consumed_train_samples"])
    check_provenance(start, config, provenance, reporter.message, data_effect=effect)
    if effect and found is not None and (before := read_history(found.provenance, config)):
        for line in kept_order(before[-1], provenance.data_history[-1], config):
            reporter.message(line)


def _leave_out(data: RunData, skipped: Ranges, reporter: Reporter) -> None:
    """Leaves samples out of training that a rollback has told to."""
    if data.train is not None:
        data.train.skipped = skipped
    ranges = ", ".join(f"{first} to {end - 1}" for first, end in skipped)
    reporter.message(f"samples left out of training since a rollback: {ranges}")


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Tokenizer files by absolute path: the checkpoint remembers them, and is read from other folders."""
    words = config.tokenizer
    vocab_file, merge_file, model = (
        str(Path(path).resolve()) if path else "" for path in (words.vocab_file, words.merge_file, words.model)
    )
    return replace(config, tokenizer=replace(words, vocab_file=vocab_file, merge_file=merge_file, model=model))


def _tell(config: RunConfig, mesh: Mesh, reporter: Reporter, peak: float | None, progress: Progress) -> None:
    """Says what starts, and lets the sinks begin."""
    facts = RunFacts(
        parameters=parameter_count(config.model),
        train_iterations=last_iteration(config),
        start_iteration=progress.iteration,
        validation_due=bool(progress.validation_due),
        world_size=mesh.world.size,
        data_parallel=mesh.dp.size,
        device=mesh.backend.device_name(),
        peak_flops=peak,
        dtype=config.precision.dtype,
    )
    reporter.start(config, facts)
