"""Parallelism config: TP, CP, PP and DP sizes, pipeline schedule and partition, gradient buckets, timeouts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from megatron_lite.config.divisors import divisors, nearest_multiples
from megatron_lite.config.flag import FIELD, Flag, Format, option
from megatron_lite.config.values import read_int
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

ContextExchange = Literal["all_gather", "p2p"]
PipelineKind = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


def _read_bucket_elements(args: Sequence[str]) -> int:
    """Return megabytes; --ddp-bucket-size counts fp32 elements."""
    elements = read_int(args[0])
    if elements < 1:
        raise ValueError("a number of elements, 1 or more")
    return -(-4 * elements // 2**20)


def _read_comm_type(args: Sequence[str]) -> str:
    """Return the exchange of keys and values; Megatron takes one, or one for each layer."""
    kinds = list(dict.fromkeys(args))
    if len(kinds) > 1:
        raise ValueError("the same value for all layers")
    if kinds[0] in ("a2a", "a2a+p2p"):
        raise ValueError(
            "p2p or all_gather: an all-to-all would split the heads over the ranks, which "
            "--tensor-model-parallel-size does"
        )
    if kinds[0] not in get_args(ContextExchange):
        raise ValueError("p2p or all_gather")
    return kinds[0]


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
    cp: int = option(
        1,
        Flag("--context-parallel-size", "Ranks that share each sequence, two chunks for each.", least=1),
    )
    cp_comm_type: ContextExchange = option(
        "p2p",
        Flag(
            "--cp-comm-type",
            "Exchange of keys and values over the context-parallel ranks: passed round a ring (p2p, the default), or "
            "all-gathered (all_gather).",
            format=Format(
                metavar="KIND", example="all_gather", read=_read_comm_type, write=lambda kind: [kind], count="some"
            ),
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
        """Data-parallel replicas. A world that tp * cp * pp does not divide is refused by a rule below."""
        return max(1, self.world_size // self.replica_size)

    @property
    def replica_size(self) -> int:
        """Ranks of one data-parallel replica."""
        return self.tp * self.cp * self.pp

    @property
    def sequence_unit(self) -> int:
        """Divisor that every sequence length must have, so that ranks hold equal parts of the sequence.

        --context-parallel-size cuts it into two chunks for each rank, --sequence-parallel into one part.
        """
        parts = self.tp if self.sequence_parallel else 1
        return parts if self.cp == 1 else self.cp * math.lcm(2, parts)


def resolve_zero_stage(given: Given) -> None:
    """Apply --zero-stage or the DeepSpeed JSON's ZeRO stage."""
    run, origin = given.run, given.origin(FIELD.command.zero_stage)
    stage = run.command.zero_stage
    if stage:
        given.give(FIELD.parallel.distributed_optimizer, True, origin)
        if run.runtime.engine == "native":
            given.notes.append("ZeRO stage 1 is read as --use-distributed-optimizer")
    elif stage == 0 and run.parallel.distributed_optimizer:
        given.refuse_both(origin, given.origin(FIELD.parallel.distributed_optimizer))


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
        size = parallel.replica_size
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
                f"{run.parallel.pp} pipeline ranks (--num-layers {layers}, {origin}, --pipeline-model-parallel-size "
                f"{run.parallel.pp})",
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


def note_unused_exchange(given: Given) -> None:
    """Note that --cp-comm-type has no effect on one context-parallel rank."""
    if given.has(FIELD.parallel.cp_comm_type) and given.run.parallel.cp == 1:
        given.notes.append("--cp-comm-type has no effect: the sequence is not split (--context-parallel-size 1)")


RESOLVERS = (resolve_zero_stage, resolve_world_size, resolve_virtual_stages, note_unused_exchange)


def replica_flags(parallel: ParallelConfig) -> str:
    """Return the flags whose product is the number of ranks of a replica, as text for errors."""
    context = f" x --context-parallel-size {parallel.cp}" if parallel.cp > 1 else ""
    return f"--tensor-model-parallel-size {parallel.tp}{context} x --pipeline-model-parallel-size {parallel.pp}"


def replicas_fill_the_world(config: RunConfig) -> Iterator[ConfigError]:
    """Require a world of whole replicas of tp x cp x pp ranks."""
    parallel = config.parallel
    replica = parallel.replica_size
    # On an XLA device the sizes count devices, and a process drives all those of its host.
    unit, start = ("devices", "use") if config.runtime.device == "xla" else ("ranks", "start")
    if parallel.world_size % replica:
        yield ConfigError(
            f"Cannot split {parallel.world_size:,} {unit} into model replicas of {replica:,} {unit} "
            f"({replica_flags(parallel)})",
            rule=f"The number of {unit} must be a multiple of tensor x "
            f"{'context x ' if parallel.cp > 1 else ''}pipeline-parallel size",
            fix=f"Change the sizes so that their product is {divisors(parallel.world_size)}, or {start} "
            f"{nearest_multiples(parallel.world_size, replica)} {unit}",
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


def sequence_can_be_split(config: RunConfig) -> Iterator[ConfigError]:
    """Require equal parts of the sequence under --context-parallel-size and --sequence-parallel."""
    parallel, length = config.parallel, config.batch.seq_length
    tp, cp, unit = parallel.tp, parallel.cp, parallel.sequence_unit
    if length % unit == 0:
        return
    if cp == 1:
        yield ConfigError(
            f"Cannot split --seq-length {length} over {tp} tensor-parallel ranks for --sequence-parallel "
            f"(--tensor-model-parallel-size {tp})",
            fix=f"Use --seq-length {nearest_multiples(length, tp)}, or remove --sequence-parallel",
        )
        return
    parts = f", and the part of each over {tp} tensor-parallel ranks (--sequence-parallel)" if unit > 2 * cp else ""
    yield ConfigError(
        f"Cannot split --seq-length {length} into {2 * cp} equal chunks, two for each of {cp} ranks "
        f"(--context-parallel-size {cp}){parts}",
        fix=f"Use --seq-length {nearest_multiples(length, unit)}, or a smaller --context-parallel-size",
    )


def block_kernel_exists(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse cuDNN's attention under context parallelism, which needs the log-sum-exp of each block."""
    if config.parallel.cp > 1 and config.runtime.attention == "fused":
        yield ConfigError(
            f"--attention-backend fused cannot be combined with --context-parallel-size {config.parallel.cp}",
            rule="Blocks of keys are merged by their log-sum-exp, which cuDNN's kernel does not return",
            fix="Use --attention-backend auto or flash",
        )


RULES = (
    replicas_fill_the_world,
    tensor_parallel_divides,
    sequence_can_be_split,
    block_kernel_exists,
)
