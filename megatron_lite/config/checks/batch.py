"""Validation rules for batch sizes, ramp-up and curriculum."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.checks.bounds import at_least, divisors, nearest_multiples
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError

MOST_MICRO_BATCHES = 1_000_000
"""Micro-batches of an iteration that a replica may run: each takes entries in lists of the schedule."""


def sizes_are_positive(config: RunConfig) -> Iterator[ConfigError]:
    """Yield sizes without which nothing else can be judged."""
    batch = config.batch
    yield from at_least(1, seq_length=batch.seq_length, micro_batch_size=batch.micro_batch_size)
    yield from at_least(0, global_batch_size=batch.global_batch_size)


def microbatch_divides_batch(config: RunConfig) -> Iterator[ConfigError]:
    """A batch is whole micro-batches; replicas may take uneven numbers of them."""
    batch = config.batch
    if batch.global_batch_size % batch.micro_batch_size:
        yield ConfigError(
            "The micro-batch must divide the global batch",
            found=f"--global-batch-size {batch.global_batch_size}, --micro-batch-size {batch.micro_batch_size}",
            fix=f"Give --micro-batch-size {divisors(batch.global_batch_size)}, or --global-batch-size "
            f"{nearest_multiples(batch.global_batch_size, batch.micro_batch_size)}",
        )


def microbatches_can_be_listed(config: RunConfig) -> Iterator[ConfigError]:
    """The pipeline schedule of an iteration is a list of its micro-batches."""
    batch, replicas = config.batch, config.parallel.dp
    sizes = [size for _, size in batch.step_schedule] or [batch.global_batch_size]
    count = max(sizes) // batch.micro_batch_size // replicas
    if count > MOST_MICRO_BATCHES:
        yield ConfigError(
            f"A replica runs at most {MOST_MICRO_BATCHES:,} micro-batches in an iteration",
            found=f"{count:,}: --global-batch-size {max(sizes):,}, --micro-batch-size {batch.micro_batch_size:,}, "
            f"{replicas:,} replicas",
            fix="Give a smaller --global-batch-size or a larger --micro-batch-size",
        )


def rampup_reaches_the_batch(config: RunConfig) -> Iterator[ConfigError]:
    """A ramp-up rises in whole steps, each a whole number of micro-batches, to the global batch."""
    batch, ramp = config.batch, config.batch.rampup
    if ramp is None:
        return
    found = f"--rampup-batch-size {ramp.start} {ramp.increment} {ramp.samples}"
    fix = (
        "Give --rampup-batch-size START INCREMENT SAMPLES such that START + n x INCREMENT is --global-batch-size, as "
        f"{batch.micro_batch_size} {batch.micro_batch_size} 100_000"
    )
    if ramp.start < 1 or ramp.increment < 1 or ramp.samples < 0:
        yield ConfigError("A ramp-up has a positive start and increment, and no negative length", found=found, fix=fix)
        return
    rise = batch.global_batch_size - ramp.start
    if rise < 0 or rise % ramp.increment:
        yield ConfigError(
            "A ramp-up must reach the global batch in whole increments",
            found=f"{found}, --global-batch-size {batch.global_batch_size}",
            fix=fix,
        )
    if ramp.start % batch.micro_batch_size or ramp.increment % batch.micro_batch_size:
        yield ConfigError(
            "The micro-batch must divide every batch of the ramp-up",
            found=f"{found}, --micro-batch-size {batch.micro_batch_size}",
            fix=f"Make start and increment multiples of {batch.micro_batch_size}, or give --micro-batch-size "
            f"{divisors(ramp.start, ramp.increment)}",
        )


def step_schedule_is_whole(config: RunConfig) -> Iterator[ConfigError]:
    """--step-batch-size-schedule: each batch whole micro-batches, the last the global batch."""
    batch = config.batch
    if not batch.step_schedule:
        return
    sizes = [size for _, size in batch.step_schedule]
    bad = [size for size in sizes if size < 1 or size % batch.micro_batch_size]
    if bad:
        yield ConfigError(
            "The micro-batch must divide every batch of the schedule",
            found=f"batches {', '.join(map(str, bad))}, --micro-batch-size {batch.micro_batch_size}",
            fix=f"Make each batch of --step-batch-size-schedule a multiple of {batch.micro_batch_size}, or lower "
            "--micro-batch-size",
        )
    if sizes[-1] != batch.global_batch_size:
        yield ConfigError(
            "The global batch is the last of --step-batch-size-schedule",
            found=f"--global-batch-size {batch.global_batch_size}, the schedule ends at {sizes[-1]}",
            fix="Leave --global-batch-size out",
        )


def one_batch_schedule(config: RunConfig) -> Iterator[ConfigError]:
    """A batch rises by one schedule, and a schedule in steps says exactly what it means."""
    batch = config.batch
    others = [
        name
        for name, set_ in (
            ("--rampup-batch-size", batch.rampup is not None),
            ("--decrease-batch-size-if-needed", batch.decrease_if_needed),
        )
        if set_
    ]
    if batch.step_schedule and others:
        yield ConfigError(
            "--step-batch-size-schedule stands alone",
            found=f"--step-batch-size-schedule and {', '.join(others)}",
            fix=f"Leave {' and '.join(others)} out, or --step-batch-size-schedule",
        )


def decreased_batch_is_not_empty(config: RunConfig) -> Iterator[ConfigError]:
    """--decrease-batch-size-if-needed leaves at least one micro-batch a replica."""
    batch, replicas = config.batch, config.parallel.dp
    one_each = batch.micro_batch_size * replicas
    if batch.decrease_if_needed and batch.global_batch_size < one_each:
        yield ConfigError(
            "A batch that may only decrease must have a micro-batch for every replica",
            found=f"--global-batch-size {batch.global_batch_size}, {replicas} replicas of --micro-batch-size "
            f"{batch.micro_batch_size}",
            fix="Leave --decrease-batch-size-if-needed out: replicas may be idle",
        )


def sequence_ramp_rises(config: RunConfig) -> Iterator[ConfigError]:
    """A curriculum goes from a shorter sequence to --seq-length in steps of tokens."""
    ramp, longest, tp = config.batch.sequence_ramp, config.batch.seq_length, config.parallel.tp
    if ramp is None:
        return
    lengths = [length for _, length in ramp.stages] or [ramp.start, ramp.step]
    if min(lengths) < 1 or max(lengths) > longest or (not ramp.stages and ramp.iterations < 1):
        yield ConfigError(
            "A curriculum's sequence lengths lie between 1 and --seq-length",
            found=f"{', '.join(map(str, lengths))} over {ramp.iterations} iterations, --seq-length {longest}",
            fix=f"Give --seq-length-warmup START:ITERATIONS:STEP, as 64:36000:8, with START and STEP up to {longest}; "
            "or change curriculum_learning in the DeepSpeed JSON",
        )
    elif config.parallel.sequence_parallel and any(length % tp for length in lengths):
        yield ConfigError(
            "The tensor-parallel size must divide every sequence length under --sequence-parallel",
            found=f"lengths {', '.join(map(str, lengths))}, --tensor-model-parallel-size {tp}",
            fix=f"Make each length and the step of the curriculum a multiple of {tp}",
        )
    firsts = [first for first, _ in ramp.stages]
    if len(set(firsts)) != len(firsts) or firsts != sorted(firsts):
        yield ConfigError(
            "A curriculum's stages begin one after the other",
            found=f"first iterations {', '.join(map(str, firsts))}",
            fix="Give each stage of --seq-length-warmup another first iteration, in rising order, as 0:64,1000:512",
        )


RULES = (
    microbatch_divides_batch,
    microbatches_can_be_listed,
    rampup_reaches_the_batch,
    step_schedule_is_whole,
    one_batch_schedule,
    decreased_batch_is_not_empty,
    sequence_ramp_rises,
)
