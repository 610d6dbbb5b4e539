"""Search over layouts: the fastest ones that fit, for a model and a number of devices.

Tensor-, context- and pipeline-parallel sizes, pipeline schedule and virtual stages, micro-batch, recomputation and
ZeRO-1 are tried in all combinations that the rules of the config allow. Heavier recomputation is tried only where
lighter does not fit, since it is slower in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megatron_lite.config.arguments import RULES
from megatron_lite.config.optimizer import RecomputeConfig
from megatron_lite.config.parallel import ParallelConfig, PipelineKind
from megatron_lite.config.run import RunConfig
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.errors import ConfigError
from megatron_lite.planner.hardware import Hardware
from megatron_lite.planner.memory import device_states, fullest_bytes
from megatron_lite.planner.step_time import StepTime, step_time_of
from megatron_lite.schedules.batch_size import final_batch_size

MAX_MICRO_BATCH, MAX_CHUNKS, MAX_CONTEXT = 32, 8, 16
MIN_CHUNK = 4096
"""Tokens of a sequence on one context-parallel rank, below which longer messages than computations are certain."""
BLOCKS = (0.25, 0.5, 0.75)
"""Shares of a stage's layers that are recomputed one by one, between none and all."""

Progress = Callable[[int, int], None]
"""Called with the number of layouts that were tried, and of all."""


@dataclass(frozen=True)
class FoundLayout:
    """A layout with its predictions.

    Attributes:
        config: the run with this layout.
        memory: bytes of the fullest rank.
        step: seconds of an iteration of the largest batch by part.
    """

    config: RunConfig
    memory: int
    step: StepTime


@dataclass(frozen=True)
class SearchResult:
    """Layouts that fit, the fastest first.

    Attributes:
        tried: number of valid layouts, with those that cannot be better than another one.
        layouts: that fit; of one with and without ZeRO-1, the faster.
        closest: the layout with the least memory, if none fits.
        closest_memory: bytes of its fullest rank.
    """

    tried: int
    layouts: tuple[FoundLayout, ...]
    closest: RunConfig | None
    closest_memory: int = 0


def search(
    config: RunConfig, vocab_size: int, machine: Hardware, progress: Progress = lambda done, total: None
) -> SearchResult:
    """Try all layouts of a run's model and batch on its number of devices.

    Args:
        config: the run; its layout is not used. model.padded_vocab_size is --pad-vocab-size-to, or 0.
        vocab_size: the tokenizer's entries.
        machine: device, its memory (0: all layouts fit) and node size.
        progress: called after each group of layouts.
    """
    groups = list(_meshes(config, machine))
    found: list[FoundLayout] = []
    tried, closest, least = 0, None, 0
    for number, parallel in enumerate(groups):
        for candidates in _variants(config, parallel, vocab_size):
            tried += len(candidates)
            fitting, smallest = _first_that_fits(candidates, machine)
            if fitting is not None:
                found.append(fitting)
            elif closest is None or smallest[1] < least:
                closest, least = smallest
        progress(number + 1, len(groups))
    found.sort(key=lambda layout: (layout.step.total, layout.memory))
    once: dict[object, FoundLayout] = {}
    for layout in found:
        once.setdefault(_apart_from_zero1(layout.config), layout)
    return SearchResult(tried, tuple(once.values()), None if found else closest, least)


def _apart_from_zero1(config: RunConfig) -> object:
    """Return the layout without what follows from the choice of ZeRO-1: whether, and which recomputation fits then."""
    return replace(config.parallel, distributed_optimizer=False), config.batch.micro_batch_size


def fewest_devices(config: RunConfig, vocab_size: int, machine: Hardware, most: int) -> int:
    """Return the smallest doubling of a run's devices on which some layout fits; 0: none up to `most`."""
    devices = 2 * config.parallel.world_size
    while devices <= most:
        wider = replace(config, parallel=replace(config.parallel, world_size=devices))
        if any(
            _first_that_fits(candidates[-1:], machine)[0] is not None
            for parallel in _meshes(wider, machine)
            if parallel.distributed_optimizer and parallel.pipeline_schedule == "1f1b"
            for candidates in islice(_variants(wider, parallel, vocab_size), 1)
        ):
            return devices
        devices *= 2
    return 0


def layout_flags(config: RunConfig) -> list[str]:
    """Return the flags of a run's layout, all that a search chooses."""
    parallel, recompute = config.parallel, config.recompute
    flags = ["--tensor-model-parallel-size", str(parallel.tp), "--pipeline-model-parallel-size", str(parallel.pp)]
    if parallel.cp > 1:
        flags += ["--context-parallel-size", str(parallel.cp)]
    if parallel.sequence_parallel:
        flags.append("--sequence-parallel")
    if parallel.num_layers_per_virtual_stage:
        flags += ["--num-layers-per-virtual-pipeline-stage", str(parallel.num_layers_per_virtual_stage)]
    elif parallel.pp > 1:
        flags += ["--pipeline-schedule", parallel.pipeline_schedule]
    flags += ["--micro-batch-size", str(config.batch.micro_batch_size)]
    if recompute.granularity != "none":
        flags += ["--recompute-granularity", recompute.granularity]
    if recompute.granularity == "full":
        flags += ["--recompute-method", recompute.method, "--recompute-num-layers", str(recompute.num_layers)]
    return [*flags, "--use-distributed-optimizer"] if parallel.distributed_optimizer else flags


def _meshes(config: RunConfig, machine: Hardware) -> Iterator[ParallelConfig]:
    """Yield sizes of the axes, schedule and ZeRO-1, without a check by the rules."""
    world, layers = config.parallel.world_size, config.model.num_layers
    base = replace(config.parallel, first_stage_layers=0, last_stage_layers=0)
    # The ZeRO stage of DeepSpeed is that of the command.
    choices = (base.distributed_optimizer,) if config.runtime.engine == "deepspeed" else (True, False)
    for tp in _powers(machine.per_node):
        for cp in _powers(max(1, min(MAX_CONTEXT, config.batch.seq_length // MIN_CHUNK))):
            if world % (tp * cp):
                continue
            for pp in (size for size in range(1, min(layers, world // (tp * cp)) + 1) if not world // (tp * cp) % size):
                for kind, chunk in _schedules(layers, pp):
                    for zero in choices if world // (tp * pp) > 1 else choices[-1:]:
                        yield replace(
                            base,
                            tp=tp,
                            cp=cp,
                            pp=pp,
                            sequence_parallel=tp > 1,
                            pipeline_schedule=kind,
                            num_layers_per_virtual_stage=chunk,
                            distributed_optimizer=zero,
                        )


def _schedules(layers: int, pp: int) -> Iterator[tuple[PipelineKind, int]]:
    """Yield pipeline schedules, with the layers of a virtual stage."""
    yield "1f1b", 0
    if pp == 1:
        return
    for chunks in range(2, MAX_CHUNKS + 1):
        if layers % (pp * chunks) == 0:
            yield "interleaved", layers // (pp * chunks)
    yield "zb-h1", 0
    if 2 * pp <= layers:
        yield "zb-v", 0


def _variants(config: RunConfig, parallel: ParallelConfig, vocab_size: int) -> Iterator[list[RunConfig]]:
    """Yield, for each micro-batch size, the valid configs with rising recomputation."""
    batch = final_batch_size(config.batch, config.parallel.dp)
    for micro_batch in _powers(MAX_MICRO_BATCH):
        if batch % micro_batch or batch // micro_batch < parallel.dp:
            continue
        sizes = replace(
            config.batch, micro_batch_size=micro_batch, global_batch_size=config.batch.global_batch_size or batch
        )
        try:
            base = with_vocabulary(replace(config, parallel=parallel, batch=sizes), vocab_size)
        except ConfigError:  # --pad-vocab-size-to cannot be split over tp
            return
        candidates = [replace(base, recompute=recompute) for recompute in _recomputations(config, parallel)]
        if valid := [one for one in candidates if not any(True for rule in RULES for _ in rule(one))]:
            yield valid


def _recomputations(config: RunConfig, parallel: ParallelConfig) -> list[RecomputeConfig]:
    stage = parallel.num_layers_per_virtual_stage or -(-config.model.num_layers // parallel.pp)
    partial = dict.fromkeys(max(1, int(share * stage)) for share in BLOCKS) if stage > 1 else {}
    blocks = [RecomputeConfig(granularity="full", method="block", num_layers=count) for count in partial]
    return [
        RecomputeConfig(),
        RecomputeConfig(granularity="selective"),
        *blocks,
        RecomputeConfig(granularity="full"),
    ]


def _first_that_fits(
    candidates: list[RunConfig], machine: Hardware
) -> tuple[FoundLayout | None, tuple[RunConfig, int]]:
    """Return the first candidate that fits; and the one with the least memory, and its bytes, if none does."""
    available = machine.device.available
    smallest = candidates[-1], 0
    if available:
        state = max(sum(parts.values()) for parts in device_states(candidates[0]))
        if state > available:
            smallest = candidates[-1], fullest_bytes(candidates[-1])
            return None, smallest
    for config in candidates:
        memory = fullest_bytes(config)
        if not available or memory <= available:
            batch = final_batch_size(config.batch, config.parallel.dp)
            step = step_time_of(config, machine, batch, config.batch.seq_length)
            return FoundLayout(config, memory, step), (config, memory)
        if not smallest[1] or memory < smallest[1]:
            smallest = config, memory
    return None, smallest


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]
