"""XLA device config: engine choice, ignored flags, batch sizes, and the config of each process in multi-host runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_lite.config.divisors import divisors
from megatron_lite.config.flag import FIELD
from megatron_lite.config.parallel import ParallelConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count

if TYPE_CHECKING:
    from megatron_lite.config.given import Given


def xla_batches_are_whole(config: RunConfig) -> Iterator[ConfigError]:
    """Require whole micro-batches for all replicas: one graph computes them together."""
    if config.runtime.device != "xla":
        return
    batch, unit = config.batch, config.batch.micro_batch_size * config.parallel.dp
    sizes = {f"--global-batch-size {batch.global_batch_size}": batch.global_batch_size or unit}
    if batch.step_schedule:
        sizes = {f"{size} in --step-batch-size-schedule": size for _, size in batch.step_schedule}
    elif batch.rampup is not None:
        sizes |= {
            f"the start {batch.rampup.start} of --rampup-batch-size": batch.rampup.start,
            f"the increment {batch.rampup.increment} of --rampup-batch-size": batch.rampup.increment,
        }
    for text, size in sizes.items():
        if size % unit:
            yield ConfigError(
                f"With --device xla, {text} is not a multiple of {unit:,} (--micro-batch-size "
                f"{batch.micro_batch_size} x {config.parallel.dp} data-parallel replicas)",
                rule="All replicas run the same number of micro-batches, in one graph",
                fix=f"Use multiples of {unit:,}, a smaller --micro-batch-size, or a larger "
                "--tensor-model-parallel-size",
            )


RULES = (xla_batches_are_whole,)

_WITHOUT_EFFECT = (
    FIELD.parallel.overlap_grad_reduce,
    FIELD.parallel.overlap_param_gather,
    FIELD.parallel.bucket_megabytes,
    FIELD.runtime.gradient_accumulation_fusion,
    FIELD.runtime.num_threads,
    FIELD.runtime.tf32,
    FIELD.metrics.log_memory,
)


def note_flags_without_effect(given: Given) -> None:
    """Note the given flags that have no effect on an XLA device, or only there."""
    run = given.run
    if run.runtime.device == "xla":
        for field in _WITHOUT_EFFECT:
            if given.has(field):
                given.notes.append(f"{given.origin(field)} has no effect with --device xla: XLA schedules the step")
    elif given.has(FIELD.runtime.xla_cache):
        given.notes.append(f"{given.origin(FIELD.runtime.xla_cache)} has no effect without --device xla")


def resolve_xla_engine(given: Given) -> None:
    """Choose the XLA engine for --device xla; it runs on no other device."""
    run, engine = given.run, given.origin(FIELD.runtime.engine)
    if run.runtime.device == "xla":
        if given.has(FIELD.runtime.engine) and run.runtime.engine != "xla":
            given.refuse(
                f"--device xla has an engine of its own, but {engine} is given",
                fix=f"Remove {engine}, or use --device cuda or --device cpu",
            )
        given.give(FIELD.runtime.engine, "xla", "--device xla")
    elif run.runtime.engine == "xla":
        given.refuse("--engine xla is given without --device xla", fix="Add --device xla, or remove --engine xla")


RESOLVERS = (resolve_xla_engine, note_flags_without_effect)


def device_count_errors(parallel: ParallelConfig, devices: int, hosts: int, kind: str) -> Iterator[ConfigError]:
    """Yield an error if a mesh does not fit the devices and hosts of a job.

    Args:
        parallel: the mesh's sizes, in devices.
        devices: of all hosts.
        hosts: each with one process.
        kind: of the devices: CPU, TPU.
    """
    if devices != parallel.world_size:
        yield ConfigError(
            f"--world-size {parallel.world_size} is not the number of XLA devices: {devices} ({kind})",
            fix=f"Give --world-size {devices}"
            + (f", or set CPU_NUM_DEVICES={max(1, parallel.world_size // hosts)}" if kind == "CPU" else ""),
        )
    elif parallel.dp % hosts:
        yield ConfigError(
            f"Cannot divide {format_count(parallel.dp, 'data-parallel replica')} of "
            f"{format_count(parallel.tp, 'device')} (--tensor-model-parallel-size {parallel.tp}) evenly among {hosts} "
            "hosts",
            rule="All devices of a replica must belong to one host, which reads the replica's samples",
            fix=f"Use --tensor-model-parallel-size {divisors(devices // hosts)}",
        )


def per_process(config: RunConfig, processes: int) -> RunConfig:
    """Return the run as one of its processes sees it: a replica that reads the samples of all its devices.

    Args:
        config: the run; the sizes of its mesh count devices.
        processes: hosts, each with one process; they divide the number of data-parallel replicas.
    """
    parallel, batch = config.parallel, config.batch
    return replace(
        config,
        parallel=replace(parallel, world_size=processes, tp=1, sequence_parallel=False),
        batch=replace(batch, micro_batch_size=batch.micro_batch_size * parallel.dp // processes),
    )
