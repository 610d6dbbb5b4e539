"""Run assembly: builds and connects model, data, optimizer, pipeline, checkpoints and metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_lite.backend.base import Backend
from megatron_lite.backend.kernels import Kernels
from megatron_lite.backend.select import select_backend
from megatron_lite.backend.warnings_once import warnings_once
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.parameters import shared_stages
from megatron_lite.config.partition import stage_layers
from megatron_lite.config.run import RunConfig
from megatron_lite.config.runtime import RuntimeConfig
from megatron_lite.config.selection import select_parameters
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.config.xla import per_process
from megatron_lite.data.serving.build import build_datasets
from megatron_lite.data.serving.dataset import Dataset
from megatron_lite.data.serving.epochs import with_epochs
from megatron_lite.data.serving.loader import Loader
from megatron_lite.errors import ConfigError
from megatron_lite.lifecycle.failure import OnAbort, report_failures
from megatron_lite.metrics.compute_time import ComputeTime, measuring_interval
from megatron_lite.metrics.profiler import Profiler
from megatron_lite.metrics.reporter import Reporter, build_reporter
from megatron_lite.metrics.throughput import Throughput
from megatron_lite.metrics.timers import Timers
from megatron_lite.model.count_check import check_count
from megatron_lite.model.gpt import GPTStage
from megatron_lite.optim.optimizer import Optimizer
from megatron_lite.parallel.buffers import ParameterBuffers
from megatron_lite.parallel.gemm import DeferredWeightGradients, FusedWeightGradients
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.parameters import apply_selection
from megatron_lite.parallel.random import RngStreams
from megatron_lite.parallel.shared import locate_shared_modules, rank_parameters
from megatron_lite.pipeline.executor import Executor, Messages, Timed
from megatron_lite.runs.code_version import PACKAGE, code_fingerprint, git_revision, source_hashes
from megatron_lite.runs.comparison import config_as_json, continue_history
from megatron_lite.runs.lock import FolderLock
from megatron_lite.runs.manifest import Provenance
from megatron_lite.runs.metrics_file import metrics_path, slowest_save
from megatron_lite.schedules.batch_size import final_batch_size, global_batch_size
from megatron_lite.schedules.pipeline import SPLIT_BACKWARD, Action, rank_of_stage
from megatron_lite.schedules.progress import Progress
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.train.batches import RunData, rank_batch_parts
from megatron_lite.train.comparison import agree_on_kernels, compare_runs, open_files
from megatron_lite.train.deepspeed import build_deepspeed_engine, require_deepspeed
from megatron_lite.train.engine import Engine
from megatron_lite.train.introduction import introduction
from megatron_lite.train.loop import Run
from megatron_lite.train.native import NativeEngine
from megatron_lite.train.provenance import compare_with_checkpoint
from megatron_lite.train.replica_check import equalize_initial_weights
from megatron_lite.train.run_facts import Origin, peak_flops, run_facts
from megatron_lite.train.spmd import build_spmd_engine
from megatron_lite.train.start import Notify, Start, find_start, load_start, settle_config
from megatron_lite.train.state import RunState


@contextmanager
def machine(runtime: RuntimeConfig, parallel: ParallelConfig, on_abort: OnAbort | None = None) -> Iterator[Backend]:
    """Open this rank's device and its connections to the other ranks; a context manager that closes them.

    Args:
        runtime: device and threads.
        parallel: world size and timeouts.
        on_abort: called before another rank's failure ends this process from a thread; see report_failures.

    Raises:
        ConfigError: the device does not exist or cannot run the configuration.
    """
    with ExitStack() as stack:
        backend = select_backend(runtime, parallel)
        stack.push(lambda kind, error, trace: backend.shutdown(failed=error is not None))
        stack.enter_context(report_failures(backend, parallel, on_abort))
        stack.enter_context(warnings_once(backend))
        yield backend


@contextmanager
def assembled(
    config: RunConfig, backend: Backend | None = None, lock: FolderLock | None = None, origin: Origin | None = None
) -> Iterator[Run]:
    """Build a run and load its checkpoint; a context manager that waits for the last save and frees everything.

    Args:
        config: as the command line gives it, before the tokenizer determines the vocabulary size.
        backend: the machine to run on, which stays open; None: a new one.
        lock: of the --save folder, on the rank that holds it; verified before anything is written there.
        origin: command line and time of the start; None: no command line, and now.

    Raises:
        ConfigError: the device cannot run the configuration, or a file is missing.
        RankDifferenceError: the ranks differ in configuration, code or files.
        DataError: a dataset or tokenizer is damaged.
        CheckpointError: the checkpoint of --load is damaged or belongs to another run.
    """
    origin = origin or Origin()
    with ExitStack() as stack:
        backend = backend or stack.enter_context(machine(config.runtime, config.parallel))
        # Before the mesh: ranks that differ in its sizes would wait for each other forever.
        sources = source_hashes(PACKAGE)
        reads_data = compare_runs(config, code_fingerprint(sources), backend)
        if config.runtime.engine == "deepspeed":
            require_deepspeed()
        mesh = build_mesh(backend, _of_process(config, backend).parallel)
        reporter = stack.enter_context(_open_reporter(config, mesh))
        # The data's fingerprints are compared with other nodes' or the checkpoint's, or saved.
        compares = bool(config.parallel.world_size > 1 or config.checkpoint.save or config.checkpoint.load)
        tokenizer, fingerprints = open_files(config, backend, reads_data=reads_data and compares)
        for text in backend.take_warnings():
            reporter.message(f"WARNING: {text}")
        config = with_epochs(with_vocabulary(_with_absolute_paths(config), tokenizer.vocab_size))
        start = find_start(config, reporter.message, mesh.world)
        config = settle_config(config, start, reporter.message)
        # Data before the model: errors in it appear before gigabytes are allocated.
        with backend.phases.enter("opening the data"):
            data = _open_data(config, backend, mesh, tokenizer, start)
        stack.callback(data.close)
        if mesh.world.rank == 0 and (config.checkpoint.save or config.checkpoint.load):
            fingerprints["code"] = code_fingerprint(sources, git_revision(PACKAGE))
        fingerprints = mesh.world.all_gather_object(fingerprints)[0]
        of_data = {name: value for name, value in fingerprints.items() if name.startswith("data ")}
        provenance = Provenance(
            config_as_json(config),
            fingerprints,
            sources=sources,
            data_history=continue_history(start.continued(config), config, of_data),
        )
        compare_with_checkpoint(start, config, provenance, data, reporter.message)
        timers = Timers(config.metrics.timing_log_level, backend.synchronize)
        # The parts of an XLA graph cannot be timed, and to measure an iteration waits for the device.
        interval = measuring_interval(config.metrics.log_interval, mesh.world.size)
        compute = ComputeTime(backend, 0 if config.runtime.engine == "xla" else interval)
        num_sources = len(data.train.names) if data.train is not None else 0
        with backend.phases.enter("building the model"):
            kernels = agree_on_kernels(config, backend)
            engine = _select_engine(
                config,
                mesh,
                num_sources=num_sources,
                timers=timers,
                compute=compute,
                kernels=kernels,
                notify=reporter.message,
            )
        stack.callback(engine.close)
        if (found := start.continued(config)) is not None and (skipped := found.provenance.skipped_samples):
            provenance = replace(provenance, skipped_samples=skipped)
            ranges = ", ".join(f"{first} to {end - 1}" for first, end in skipped)
            reporter.message(f"samples skipped since a rollback: {ranges}")
        found_path = start.path
        with backend.phases.enter("loading"):
            start, progress = load_start(start, engine, config, reporter.message)
        if start.path is None:
            equalize_initial_weights(engine, backend, reporter)
        if start.path != found_path:  # an earlier checkpoint, from which the run may need other samples
            with backend.phases.enter("opening the data"):
                data = _open_data(config, backend, mesh, tokenizer, start)
            stack.callback(data.close)
            history = continue_history(start.continued(config), config, of_data)
            provenance = replace(provenance, data_history=history)
        if data.train is not None:
            data.train.skipped = provenance.skipped_samples
        earlier_save = _earlier_save(config, mesh, start)
        state = stack.enter_context(
            RunState(config, mesh.world, provenance, start, reporter, earlier_save=earlier_save, lock=lock)
        )
        if (loaded := start.continued(config)) is not None:
            state.load(loaded.scalars)
        reporter.message(introduction(config, backend, data, start, progress, kernels.report))
        reporter.start(config, run_facts(config, mesh, progress, origin, kernels))
        _warn(config, data, progress, reporter)
        yield Run(
            config=_of_process(config, backend),
            mesh=mesh,
            engine=engine,
            data=data,
            state=state,
            reporter=reporter,
            timers=timers,
            compute=compute,
            profiler=stack.enter_context(Profiler(config, backend, mesh.world, reporter)),
            throughput=Throughput(
                config.model, devices=config.parallel.world_size, peak_flops=peak_flops(config, backend)
            ),
            progress=progress,
        )


def _open_reporter(config: RunConfig, mesh: Mesh) -> Reporter:
    """Return the reporter of this rank: the last rank has the loss, so it reports, as in Megatron."""
    world = mesh.world
    return build_reporter(
        config,
        sys.stdout,
        active=world.rank == world.size - 1,
        emissions_rank=world.rank if mesh.backend.local_rank == 0 else None,
    )


def _earlier_save(config: RunConfig, mesh: Mesh, start: Start) -> float:
    """Return the seconds of the slowest save of the run's earlier jobs; 0: none is known."""
    # Rank 0 decides when the time limit stops the run: 256 ranks need not read the file.
    path = metrics_path(config) if mesh.world.rank == 0 and start.path is not None else None
    return slowest_save(path) if path is not None else 0.0


def _warn(config: RunConfig, data: RunData, progress: Progress, reporter: Reporter) -> None:
    """Report warnings about a profile that begins too late, and about the data."""
    if config.profile.on and progress.iteration >= config.profile.last:
        reporter.message(
            f"WARNING: no iteration is profiled: training continues after iteration {progress.iteration}, and "
            f"--profile-step-end is {config.profile.last}"
        )
    for text in data.warnings:
        reporter.message(f"WARNING: {text}")


def _select_engine(
    config: RunConfig,
    mesh: Mesh,
    *,
    num_sources: int,
    timers: Timers,
    compute: ComputeTime,
    kernels: Kernels,
    notify: Notify,
) -> Engine:
    """Build the engine of --engine; arguments as for build_engine, and `notify` receives lines for the log."""
    match config.runtime.engine:
        case "deepspeed":
            timed = _timing(timers, compute, level=1)
            return build_deepspeed_engine(config, mesh, num_sources=num_sources, timed=timed)
        case "xla":
            return build_spmd_engine(config, mesh, num_sources=num_sources, notify=notify)
        case "native":
            return build_engine(config, mesh, num_sources=num_sources, timers=timers, compute=compute, kernels=kernels)


def build_engine(
    config: RunConfig,
    mesh: Mesh,
    *,
    num_sources: int = 0,
    trace: list[Action] | None = None,
    timers: Timers | None = None,
    compute: ComputeTime | None = None,
    kernels: Kernels | None = None,
) -> NativeEngine:
    """Build the native engine: this rank's stages with their buffers, optimizer and executor.

    Args:
        config: the run, with the vocabulary size.
        mesh: this rank's groups.
        num_sources: data sources of a blend whose losses are reported one by one.
        trace: if given, every action of the executor is appended to it.
        timers: measure the parts of a step and, from level 2 on, of a micro-batch; None: no timing.
        compute: measures the time of this rank by part, if there are timers; None: it is not measured.
        kernels: of the run; None: PyTorch's.

    Raises:
        ConfigError: --freeze or --lr-factors does not fit the model.
    """
    parallel, selection = config.parallel, select_parameters(config)
    rng = RngStreams(config.runtime.seed, mesh.backend, mesh.tp.rank, mesh.cp.rank)
    deferred = DeferredWeightGradients() if parallel.pipeline_schedule in SPLIT_BACKWARD else None
    kernels = kernels or Kernels()
    kernel = kernels.weight_gradient
    # A compiled graph returns its gradients, and cannot hold the side effect of adding them.
    fused = FusedWeightGradients() if kernel and deferred is None and config.runtime.compile == "off" else None
    layers = stage_layers(config.model, parallel, config.batch.seq_length)
    ranks = [rank_of_stage(parallel.pipeline_schedule, parallel.pp, stage) for stage in range(len(layers))]
    stages = {
        stage: GPTStage(config, layers[stage], mesh, rng, deferred or fused, kernels)
        for stage, rank in enumerate(ranks)
        if rank == mesh.pp.rank
    }
    for stage in stages.values():
        check_count(stage)
    shared = locate_shared_modules(shared_stages(config.model, layers), ranks, mesh)
    buffers = ParameterBuffers(
        apply_selection(rank_parameters(stages, shared, mesh.pp.rank), selection),
        dp=mesh.replicas,
        tp=mesh.tp,
        shared=shared,
        bucket_megabytes=parallel.bucket_megabytes,
        shard=parallel.distributed_optimizer,
        overlap=parallel.overlap_grad_reduce,
        fused=kernel,
    )
    if fused is not None:
        fused.accumulate = buffers.accumulate_product
    for stage in stages.values():
        if config.runtime.compile == "stage":
            stage.compile()
        elif config.runtime.compile == "layer":
            stage.compile_layers()
    # A graph of a stage cannot hold a wait.
    if parallel.overlap_param_gather and config.runtime.compile != "stage":
        buffers.overlap_gather(unit for stage in stages.values() for unit in stage.units)
    executor = Executor(
        stages,
        num_stages=len(layers),
        rng=rng,
        messages=Messages(mesh.pp, mesh.backend.device),
        accumulate=buffers.accumulate_product,
        deferred=deferred,
        trace=trace,
        timed=_timing(timers, compute, level=2),
    )
    optimizer = Optimizer(config, buffers, mesh)
    return NativeEngine(
        config, mesh, stages, buffers, optimizer, executor, num_sources, _timing(timers, compute, level=1)
    )


def _timing(timers: Timers | None, compute: ComputeTime | None, *, level: int) -> Timed | None:
    """Return what measures the blocks of a --timing-log-level; None: nothing."""
    if timers is None or compute is None:
        return (lambda name: timers(name, level)) if timers is not None else None
    return lambda name: compute.around(name, timers(name, level))


def _of_process(config: RunConfig, backend: Backend) -> RunConfig:
    """Return the run as this process sees it: a rank of the mesh, or on an XLA device a host with all its devices."""
    return per_process(config, backend.world_size) if config.runtime.device == "xla" else config


def _open_data(config: RunConfig, backend: Backend, mesh: Mesh, tokenizer: Tokenizer, start: Start) -> RunData:
    order = continue_history(start.continued(config), config)[-1]
    datasets = build_datasets(
        config, order, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint()
    )
    process = _of_process(config, backend)
    data, dp = config.data, process.parallel.dp
    needs_eod = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
    eod = tokenizer.eod if needs_eod else -1
    final = final_batch_size(config.batch, dp)

    def loader(dataset: Dataset, *, training: bool = False) -> Loader:
        return Loader(
            dataset,
            micro_batch=process.batch.micro_batch_size,
            global_batch=(lambda consumed: global_batch_size(config.batch, consumed, dp))
            if training
            else (lambda consumed: final),
            dp=dp,
            replica=mesh.dp.rank,
            cyclic_layout=order.cyclic_layout if training else None,
            repeats=not training,
        )

    if not datasets.valid and not config.training.skip_train:
        needs = {"--early-stopping-patience": config.tuning.patience, "--save-best": config.checkpoint.save_best}
        for flag in [flag for flag, given in needs.items() if given]:
            raise ConfigError(
                f"{flag} needs validation data, and there is none"
                + (f" (--split {data.split})" if data.sources else ""),
                fix=f"Give a --split with a second share above 0 (949,50,1), or --valid-data-path, or remove {flag}",
            )
    return RunData(
        backend,
        rank_batch_parts(config, mesh.pp.rank),
        eod,
        data.prefetch,
        train=loader(datasets.train, training=True) if datasets.train is not None else None,
        valid={name: loader(dataset) for name, dataset in datasets.valid.items()},
        test={name: loader(dataset) for name, dataset in datasets.test.items()},
        plans=datasets.plans,
        warnings=datasets.notices.warnings,
    )


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make tokenizer files absolute: the checkpoint stores the paths, and is read from other folders."""
    tokenizer = config.tokenizer
    vocab_file, merge_file, model = (
        str(Path(path).resolve()) if path else ""
        for path in (tokenizer.vocab_file, tokenizer.merge_file, tokenizer.model)
    )
    return replace(config, tokenizer=replace(tokenizer, vocab_file=vocab_file, merge_file=merge_file, model=model))
