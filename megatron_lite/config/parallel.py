"""Parallelism config: TP, PP and DP sizes, pipeline schedule and partition, gradient buckets, timeouts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_lite.config.divisors import divisors, nearest_multiples
from megatron_lite.config.flag import FIELD, Flag, Format, option
from megatron_lite.config.partition import num_stages
from megatron_lite.config.values import read_int
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_count

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

PipelineKind = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]
PARTITION_METHODS = ("balanced", "uniform", "parameters")


def _read_bucket_elements(args: Sequence[str]) -> int:
    """Return megabytes; --ddp-bucket-size counts fp32 elements."""
    elements = read_int(args[0])
    if elements < 1:
        raise ValueError("a number of elements, 1 or more")
    return -(-4 * elements // 2**20)


def _read_pipe_size(args: Sequence[str]) -> int:
    """Return the number of stages; Megatron 1.1's 0 is 1."""
    return read_int(args[0]) or 1


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh's axes. The data-parallel size is the rest of the world size."""

    world_size: int = option(
        1,
        Flag("--world-size", "Ranks of the job, where no launcher sets it (explain, --dry-run).", least=1, most=10**7),
    )
    tp: int = option(
        1,
        Flag(
            "--tensor-model-parallel-size", "Ranks that share each layer.", aliases=("--model-parallel-size",), least=1
        ),
    )
    pp: int = option(
        1,
        Flag("--pipeline-model-parallel-size", "Pipeline stages.", least=1),
        Flag(
            "--pipe-parallel-size",
            "The same, as Megatron 1.1 with DeepSpeed and GPT-NeoX spell it; 0 is 1.",
            format=Format(metavar="N", example="4", read=_read_pipe_size, count="one"),
            means="--pipeline-model-parallel-size",
        ),
    )
    sequence_parallel: bool = option(
        False, Flag("--sequence-parallel", "Split norms and dropout by sequence.", sets=True)
    )
    distributed_optimizer: bool = option(
        False,
        Flag(
            "--use-distributed-optimizer",
            "Shard optimizer state and main parameters over the data-parallel ranks (ZeRO-1).",
            sets=True,
        ),
    )
    overlap_grad_reduce: bool = option(
        True,
        Flag("--overlap-grad-reduce", "Reduce gradients during backward.", sets=True),
        Flag("--no-overlap-grad-reduce", "Reduce gradients after backward.", sets=False),
    )
    overlap_param_gather: bool = option(
        True,
        Flag(
            "--overlap-param-gather",
            "Gather parameters (ZeRO-1) during forward; no effect with --compile stage.",
            sets=True,
        ),
        Flag("--no-overlap-param-gather", "Gather parameters (ZeRO-1) before forward.", sets=False),
    )
    bucket_megabytes: int = option(
        160,
        Flag("--bucket-megabytes", "Size of a gradient bucket (fp32).", least=1),
        Flag(
            "--ddp-bucket-size",
            "The same in gradients instead of megabytes.",
            format=Format(metavar="GRADIENTS", example="40_000_000", read=_read_bucket_elements),
            means="--bucket-megabytes",
        ),
    )
    distributed_timeout_minutes: float = option(
        10.0, Flag("--distributed-timeout-minutes", "Timeout of a collective.", above=0, most=10**7)
    )
    rendezvous_timeout_minutes: float = option(
        10.0,
        Flag(
            "--rendezvous-timeout-minutes", "Timeout of the rendezvous of all ranks at the start.", above=0, most=10**7
        ),
    )

    num_layers_per_virtual_stage: int = option(
        0,
        Flag(
            "--num-layers-per-virtual-pipeline-stage",
            "Layers of a model chunk under the interleaved schedule (0: one chunk a rank).",
        ),
    )
    pipeline_schedule: PipelineKind = option(
        "1f1b", Flag("--pipeline-schedule", "Order of a stage's forwards and backwards.")
    )
    partition_method: str = option(
        "balanced",
        Flag(
            "--pp-partition-method",
            "Assignment of layers to stages: balanced by work (head counted), uniform, parameters, or by a count "
            "of the layers that match, as type:transformer|embedding.",
            metavar="METHOD",
        ),
    )
    first_stage_layers: int = option(
        0, Flag("--decoder-first-pipeline-num-layers", "Layers of the first stage (0: by --pp-partition-method).")
    )
    last_stage_layers: int = option(
        0, Flag("--decoder-last-pipeline-num-layers", "Layers of the last stage (0: by --pp-partition-method).")
    )

    @property
    def dp(self) -> int:
        """Data-parallel replicas. A world that tp * pp does not divide is refused by a rule below."""
        return max(1, self.world_size // (self.tp * self.pp))


def resolve_zero_stage(given: Given) -> None:
    """Apply --zero-stage or the DeepSpeed JSON's ZeRO stage."""
    run, origin = given.run, given.origin(FIELD.command.zero_stage)
    stage = run.command.zero_stage
    if stage == 1:
        given.give(FIELD.parallel.distributed_optimizer, True, origin)
        given.notes.append("ZeRO stage 1 is read as --use-distributed-optimizer")
    elif stage == 0 and run.parallel.distributed_optimizer:
        given.refuse_both(origin, given.origin(FIELD.parallel.distributed_optimizer))
    elif stage:
        given.refuse(
            f"ZeRO stage {stage} is not supported ({origin})",
            rule="Only stage 1 is: the optimizer state is sharded over the replicas, gradients and parameters are "
            "whole on each",
            fix="Use stage 1; if memory is short, raise --tensor-model-parallel-size or --pipeline-model-parallel-size",
        )


def resolve_world_size(given: Given) -> None:
    """Take the world size of the launcher, else --world-size, else one replica."""
    parallel, launched = given.run.parallel, given.launched
    if given.has(FIELD.parallel.world_size):
        if launched is not None and parallel.world_size != launched:
            given.refuse(
                f"--world-size {parallel.world_size} differs from the {launched} ranks that the launcher started",
                fix=f"Remove --world-size, or start {parallel.world_size} ranks",
            )
        return
    size = launched
    if size is None:
        size = parallel.tp * parallel.pp
        if size > 1:
            given.notes.append(f"the world size is not given: assuming {size}, one replica (see --world-size)")
    given.give(FIELD.parallel.world_size, size, "the launcher")


def resolve_virtual_stages(given: Given) -> None:
    """Apply --num-virtual-stages-per-pipeline-rank; virtual stages select the interleaved schedule."""
    run = given.run
    if given.has(FIELD.parallel.partition_method):
        # Scripts quote the method twice, once for a shell that is not there.
        method, origin = run.parallel.partition_method.strip("'\""), given.origin(FIELD.parallel.partition_method)
        given.give(FIELD.parallel.partition_method, method, origin)
    chunks, origin = run.command.virtual_stages, given.origin(FIELD.command.virtual_stages)
    if chunks > 1:
        layers, stages = run.model.num_layers, run.parallel.pp * chunks
        if layers % stages:
            given.refuse(
                f"Cannot split {layers} layers into {stages} equal virtual stages, {chunks} on each of "
                f"{run.parallel.pp} "
                f"pipeline ranks (--num-layers {layers}, {origin}, --pipeline-model-parallel-size {run.parallel.pp})",
                fix=f"Use --num-layers {nearest_multiples(layers, stages)}"
                + (
                    f", or --num-virtual-stages-per-pipeline-rank {divisors(layers // run.parallel.pp)}"
                    if layers % run.parallel.pp == 0
                    else ""
                ),
            )
        else:
            given.give(FIELD.parallel.num_layers_per_virtual_stage, layers // stages, origin)
    if given.run.parallel.num_layers_per_virtual_stage and not given.has(FIELD.parallel.pipeline_schedule):
        origin = given.origin(FIELD.parallel.num_layers_per_virtual_stage)
        given.give(FIELD.parallel.pipeline_schedule, "interleaved", origin)


RESOLVERS = (resolve_zero_stage, resolve_world_size, resolve_virtual_stages)


def replicas_fill_the_world(config: RunConfig) -> Iterator[ConfigError]:
    """Require a world of whole replicas of tp x pp ranks."""
    parallel = config.parallel
    replica = parallel.tp * parallel.pp
    if parallel.world_size % replica:
        yield ConfigError(
            f"Cannot split {parallel.world_size:,} ranks into model replicas of {replica:,} ranks "
            f"(--tensor-model-parallel-size {parallel.tp} x --pipeline-model-parallel-size {parallel.pp})",
            rule="The number of ranks must be a multiple of tensor x pipeline-parallel size",
            fix=f"Change the two sizes so that their product is {divisors(parallel.world_size)}, or start "
            f"{nearest_multiples(parallel.world_size, replica)} ranks",
        )


def tensor_parallel_divides(config: RunConfig) -> Iterator[ConfigError]:
    """Require equal parts of heads, groups, MLP and vocabulary for tensor-parallel ranks."""
    model, tp = config.model, config.parallel.tp
    for flag, size in (
        ("--num-attention-heads", model.num_attention_heads),
        ("--num-query-groups", model.num_query_groups),
        ("--ffn-hidden-size", model.ffn_hidden_size),
        ("--pad-vocab-size-to", model.padded_vocab_size),
    ):
        follows_heads = flag == "--num-query-groups" and size == model.num_attention_heads
        if size % tp and not follows_heads:
            yield ConfigError(
                f"Cannot split {flag} {size} over {tp} tensor-parallel ranks (--tensor-model-parallel-size {tp})",
                fix=f"Use --tensor-model-parallel-size {divisors(size)}, or {flag} {nearest_multiples(size, tp)}",
            )


def sequence_parallel_divides(config: RunConfig) -> Iterator[ConfigError]:
    """Require equal parts of the sequence under --sequence-parallel."""
    tp, length = config.parallel.tp, config.batch.seq_length
    if config.parallel.sequence_parallel and length % tp:
        yield ConfigError(
            f"Cannot split --seq-length {length} over {tp} tensor-parallel ranks for --sequence-parallel "
            f"(--tensor-model-parallel-size {tp})",
            fix=f"Use --seq-length {nearest_multiples(length, tp)}, or remove --sequence-parallel",
        )


def stages_have_layers(config: RunConfig) -> Iterator[ConfigError]:
    """Require at least one layer for every stage."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = num_stages(config.model, parallel)
    if stages > layers:
        yield ConfigError(
            f"Cannot split {layers} layers over {stages:,} pipeline stages (--num-layers {layers}, "
            f"--pipeline-model-parallel-size {parallel.pp})",
            fix=f"Use --pipeline-model-parallel-size {max(1, layers * parallel.pp // stages)} or less, or more layers",
        )


def virtual_stages_are_whole(config: RunConfig) -> Iterator[ConfigError]:
    """Require equally many chunks for every rank under the interleaved schedule."""
    parallel, layers = config.parallel, config.model.num_layers
    chunk = parallel.num_layers_per_virtual_stage
    flag = f"--num-layers-per-virtual-pipeline-stage {chunk}"
    interleaved = parallel.pipeline_schedule == "interleaved"
    if interleaved and not chunk:
        yield ConfigError(
            "--pipeline-schedule interleaved is given without --num-layers-per-virtual-pipeline-stage",
            fix="Use --pipeline-schedule 1f1b: a pipeline of one stage (--pipeline-model-parallel-size 1) has no "
            "other schedule"
            if parallel.pp < 2
            else f"Add --num-layers-per-virtual-pipeline-stage N with N = {divisors(layers // parallel.pp)}: each "
            f"rank then holds {layers // parallel.pp} / N chunks of N layers"
            if layers % parallel.pp == 0
            else f"Use --num-layers {nearest_multiples(layers, parallel.pp)} and add "
            "--num-layers-per-virtual-pipeline-stage N, or use --pipeline-schedule 1f1b",
        )
    if not chunk:
        return
    if not interleaved:
        yield ConfigError(
            f"{flag} has no effect with --pipeline-schedule {parallel.pipeline_schedule}",
            fix="Use --pipeline-schedule interleaved, or remove --num-layers-per-virtual-pipeline-stage",
        )
    if parallel.pp < 2:
        yield ConfigError(
            f"{flag} has no effect with one pipeline stage (--pipeline-model-parallel-size {parallel.pp})",
            fix="Use --pipeline-model-parallel-size 2 or more, or remove --num-layers-per-virtual-pipeline-stage",
        )
    if layers % (chunk * parallel.pp):
        yield ConfigError(
            f"Cannot give each of {parallel.pp} pipeline ranks the same number of chunks of {chunk} layers, {layers} "
            "in all "
            f"(--num-layers {layers}, --pipeline-model-parallel-size {parallel.pp}, {flag})",
            fix=f"Use --num-layers-per-virtual-pipeline-stage {divisors(layers // parallel.pp)}"
            if layers % parallel.pp == 0
            else f"Use --num-layers {nearest_multiples(layers, chunk * parallel.pp)}"
            + (
                f", or --pipeline-model-parallel-size {layers // chunk}"
                if 2 * chunk <= layers and layers % chunk == 0
                else ""
            ),
        )


def partition_is_known(config: RunConfig) -> Iterator[ConfigError]:
    """Require a known --pp-partition-method, or a valid regular expression."""
    method = config.parallel.partition_method
    if method in PARTITION_METHODS:
        return
    kind, _, pattern = method.partition(":")
    fault = "is unknown"
    if kind.lower() == "type":
        fault = "has no regular expression after the colon"
        try:
            if pattern and re.compile(pattern):
                return
        except re.error as error:
            fault = f"has an invalid regular expression: {error}"
    yield ConfigError(
        f"--pp-partition-method {method} {fault}",
        fix="Use balanced, uniform, parameters, or, in quotation marks for the shell, 'type:REGEX' with a regular "
        "expression of layer names, for example 'type:transformer|embedding'",
    )


def given_ends_fit(config: RunConfig) -> Iterator[ConfigError]:
    """Require a layer for each stage between a sized first and last stage."""
    parallel, layers = config.parallel, config.model.num_layers
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    if not first and not last:
        return
    sizes = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    given = [flag for flag, size in sizes.items() if size]
    ends = ", ".join(f"{flag} {sizes[flag]}" for flag in given)
    if parallel.pp < 2:
        yield ConfigError(
            f"The model has one pipeline stage, whose layers cannot be chosen ({ends}, --pipeline-model-parallel-size "
            f"{parallel.pp})",
            fix=f"Use --pipeline-model-parallel-size 2 or more, or remove {' and '.join(given)}",
        )
        return
    if parallel.pipeline_schedule == "interleaved":
        yield ConfigError(
            f"The stages of --pipeline-schedule interleaved all have equally many layers ({ends})",
            fix=f"Remove {' and '.join(given)}, or use --pipeline-schedule 1f1b without virtual stages",
        )
        return
    others = num_stages(config.model, parallel) - (first > 0) - (last > 0)
    rest = layers - first - last
    if rest < others or (not others and rest):
        yield ConfigError(
            f"Cannot assign {layers} layers to {others + len(given)} pipeline stages: the sizes given leave {rest} "
            "layers "
            f"for {others} other stages ({ends}, --num-layers {layers})",
            rule="Every stage needs a layer, and every layer a stage",
            fix=f"Give {' and '.join(given)} at most "
            f"{format_count(layers - others, 'layer')}{' in all' if len(given) > 1 else ''}"
            if others
            else f"Give the two flags numbers whose sum is {layers}",
        )


RULES = (
    replicas_fill_the_world,
    tensor_parallel_divides,
    sequence_parallel_divides,
    stages_have_layers,
    virtual_stages_are_whole,
    partition_is_known,
    given_ends_fit,
)
