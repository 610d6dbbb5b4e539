"""Batch config: sequence length, micro-batch and global batch size, batch ramp-up, sequence-length curriculum."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING

from megatron_lite.config.divisors import divisors, nearest_multiples
from megatron_lite.config.flag import FIELD, Flag, Format, flags, option
from megatron_lite.config.values import read_float, read_int
from megatron_lite.errors import ConfigError

if TYPE_CHECKING:
    from megatron_lite.config.given import Given
    from megatron_lite.config.run import RunConfig

MAX_MICRO_BATCHES = 1_000_000
"""Micro-batches of a replica in an iteration: each takes entries in lists of the pipeline schedule."""
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True, kw_only=True)
class Rampup:
    """--rampup-batch-size: from `start` in steps of `increment` over the first `samples` samples."""

    start: int
    increment: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class SequenceRamp:
    """Curriculum by sequence length (Li et al. 2021, arXiv:2108.06084), as DeepSpeed's JSON spells it.

    fixed_linear: from `start` to seq_length over `iterations`, rounded down to a multiple of `step`.
    staged: `stages` holds (first iteration, length) pairs; the other fields are unused.
    """

    start: int = 0
    iterations: int = 0
    step: int = 8
    stages: tuple[tuple[int, int], ...] = ()


def read_rampup(args: Sequence[str]) -> Rampup:
    """Read the arguments of --rampup-batch-size: start batch, increment, samples of the ramp-up."""
    try:
        start, increment, samples = (read_int(arg) for arg in args)
    except ValueError:
        raise ValueError("three whole numbers: start batch, increment and samples of the ramp-up") from None
    return Rampup(start=start, increment=increment, samples=samples)


def write_rampup(rampup: Rampup) -> list[str]:
    """Return the arguments of --rampup-batch-size."""
    return [str(rampup.start), str(rampup.increment), str(rampup.samples)]


def read_sequence_ramp(args: Sequence[str]) -> SequenceRamp:
    """Read "64:36000:8" (start:iterations:step, linear) or "0:64,1000:512" (first iteration:length, staged)."""
    expected = "start:iterations[:step], for example 64:36000:8, or stages, for example 0:64,1000:512"
    entries = [entry.split(":") for entry in re.split(r"[\s,]+", " ".join(args).strip())]
    try:
        numbers = [[read_int(number) for number in entry] for entry in entries]
    except ValueError:
        raise ValueError(expected) from None
    if all(len(entry) == 2 for entry in numbers) and (len(numbers) > 1 or numbers[0][0] <= 1):
        return SequenceRamp(stages=tuple(sorted((first, length) for first, length in numbers)))
    if len(numbers) != 1 or len(numbers[0]) not in (2, 3):
        raise ValueError(expected)
    start, iterations, *step = numbers[0]
    return SequenceRamp(start=start, iterations=iterations, step=step[0] if step else SequenceRamp().step)


def write_sequence_ramp(ramp: SequenceRamp) -> list[str]:
    """Return the argument of --seq-length-warmup."""
    if ramp.stages:
        return [",".join(f"{first}:{length}" for first, length in ramp.stages)]
    return [f"{ramp.start}:{ramp.iterations}:{ramp.step}"]


def read_amount(arg: str) -> int:
    """Read a whole number that may end in K, M, B or T, as 2.4B.

    Raises:
        ValueError: not a number, or not a whole one.
    """
    scale = SUFFIXES.get(arg[-1:].lower())
    digits = arg if scale is None else arg[:-1]
    read_float(digits)  # refuses, with a message, what Decimal alone would accept
    number = Decimal(digits) * (scale or 1)
    if number != int(number):
        raise ValueError("whole numbers of tokens (2.4B is 2,400,000,000)")
    return int(number)


def read_step_schedule(text: str, seq_length: int) -> tuple[tuple[int, int], ...]:
    """Read "0:16 2.4B:320" (from that many tokens on, this global batch) as (samples, batch) pairs, sorted.

    Raises:
        ValueError: not pairs, or no pair that starts at 0.
    """
    pairs = []
    for entry in re.split(r"[\s,]+", text.strip()):
        threshold, colon, batch = entry.partition(":")
        if not colon:
            raise ValueError("TOKENS:BATCH pairs, as in 0:16 2.4B:320")
        pairs.append((read_amount(threshold) // max(1, seq_length), read_int(batch)))
    pairs.sort()
    if pairs[0][0] != 0:
        raise ValueError("a first pair that starts at 0 tokens, as in 0:16 2.4B:320")
    if len({start for start, _ in pairs}) != len(pairs):
        raise ValueError(f"numbers of tokens that differ by at least one sample ({seq_length} tokens: --seq-length)")
    return tuple(pairs)


def write_step_schedule(schedule: Sequence[tuple[int, int]], seq_length: int) -> str:
    """Return the argument of --step-batch-size-schedule, whose thresholds are tokens."""
    return " ".join(f"{start * seq_length}:{batch}" for start, batch in schedule)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes in samples (one sample is one sequence of `seq_length` tokens)."""

    seq_length: int = field(
        metadata=flags(
            Flag("--seq-length", "Tokens of a sample.", aliases=("--encoder-seq-length",), least=1, most=10**9)
        )
    )
    micro_batch_size: int = field(
        metadata=flags(
            Flag(
                "--micro-batch-size",
                "Samples that a replica computes at once.",
                aliases=("--batch-size",),
                least=1,
                most=10**6,
            )
        )
    )
    global_batch_size: int = option(
        0,
        Flag(
            "--global-batch-size",
            "Samples of an iteration after any ramp-up (micro-batch x data-parallel size if not given). The "
            "micro-batch must divide it; the data-parallel size need not.",
        ),
    )
    rampup: Rampup | None = option(
        None,
        Flag(
            "--rampup-batch-size",
            "Start batch, increment and samples of a batch ramp-up.",
            format=Format(
                metavar="START INCREMENT SAMPLES",
                example="16 16 5_000_000",
                read=read_rampup,
                write=write_rampup,
                count="three",
            ),
        ),
    )
    step_schedule: tuple[tuple[int, int], ...] = ()
    """(consumed samples, global batch from there on) pairs, sorted; see CommandOptions.step_batch_size_schedule."""
    decrease_if_needed: bool = option(
        False,
        Flag(
            "--decrease-batch-size-if-needed",
            "Round the batch down to a multiple of micro-batch x data-parallel size.",
            sets=True,
        ),
    )
    sequence_ramp: SequenceRamp | None = option(
        None,
        Flag(
            "--seq-length-warmup",
            "Curriculum by sequence length: START:ITERATIONS[:STEP], or stages as 1:64,1000:512.",
            format=Format(
                metavar="START:ITERATIONS[:STEP]",
                example="64:36000:8",
                read=read_sequence_ramp,
                write=write_sequence_ramp,
            ),
        ),
    )


def resolve_global_batch(given: Given) -> None:
    """Derive the final global batch: --gas, the last of --step-batch-size-schedule, or one micro-batch a replica.

    Called once the world size and all required fields are known.
    """
    _resolve_accumulation(given)
    run, text = given.run, given.run.command.step_batch_size_schedule
    if text:
        origin = given.origin(FIELD.command.step_batch_size_schedule)
        try:
            schedule = read_step_schedule(text, run.batch.seq_length)
        except ValueError as error:
            given.unreadable = True
            given.refuse(
                f"Cannot read {origin}: expected {error}",
                fix='Write --step-batch-size-schedule "TOKENS:BATCH …", for example "0:16 2.4B:320 4.8B:624"',
            )
            return
        given.give(FIELD.batch.step_schedule, schedule, origin)
        if not run.batch.global_batch_size:
            given.give(FIELD.batch.global_batch_size, schedule[-1][1], origin)
    if not given.run.batch.global_batch_size:
        size = run.batch.micro_batch_size * run.parallel.dp
        given.give(FIELD.batch.global_batch_size, size, "--micro-batch-size")


def _resolve_accumulation(given: Given) -> None:
    run, origin = given.run, given.origin(FIELD.command.accumulation_steps)
    if not origin:
        return
    steps, micro, replicas = run.command.accumulation_steps, run.batch.micro_batch_size, run.parallel.dp
    size, asked = steps * micro * replicas, run.batch.global_batch_size
    if asked and asked != size:
        given.refuse(
            f"{given.origin(FIELD.batch.global_batch_size)} and {origin} contradict each other: micro-batch {micro} x "
            f"{steps} accumulation steps x data-parallel size {replicas} = {size}",
            fix=f"Remove {origin.split()[0]}, or use --global-batch-size {size}",
        )
    else:
        given.give(FIELD.batch.global_batch_size, size, origin)
        given.notes.append(
            f"{origin} is read as --global-batch-size {size}: micro-batch {micro} x {steps} accumulation steps x "
            f"data-parallel size {replicas}"
        )


def microbatch_divides_batch(config: RunConfig) -> Iterator[ConfigError]:
    """Require a global batch of whole micro-batches; replicas may run uneven numbers of them."""
    batch = config.batch
    if not batch.step_schedule and batch.global_batch_size % batch.micro_batch_size:
        yield ConfigError(
            f"Cannot split a global batch of {batch.global_batch_size} samples into micro-batches of "
            f"{batch.micro_batch_size} (--global-batch-size {batch.global_batch_size}, --micro-batch-size "
            f"{batch.micro_batch_size})",
            fix=f"Use --micro-batch-size {divisors(batch.global_batch_size)}, or --global-batch-size "
            f"{nearest_multiples(batch.global_batch_size, batch.micro_batch_size)}",
        )


def microbatches_can_be_listed(config: RunConfig) -> Iterator[ConfigError]:
    """Bound the micro-batches of an iteration, which the pipeline schedule lists."""
    batch, replicas = config.batch, config.parallel.dp
    sizes = [size for _, size in batch.step_schedule] or [batch.global_batch_size]
    count = max(sizes) // batch.micro_batch_size // replicas
    if count > MAX_MICRO_BATCHES:
        yield ConfigError(
            f"Each data-parallel replica would run {count:,} micro-batches in an iteration; the limit is "
            f"{MAX_MICRO_BATCHES:,} (--global-batch-size {max(sizes)}, --micro-batch-size {batch.micro_batch_size}, "
            f"{replicas:,} replicas)",
            fix="Use a smaller --global-batch-size or a larger --micro-batch-size",
        )


def rampup_reaches_the_batch(config: RunConfig) -> Iterator[ConfigError]:
    """Require a ramp-up in whole steps to the global batch, each of whole micro-batches."""
    batch, ramp = config.batch, config.batch.rampup
    if ramp is None:
        return
    flag = f"--rampup-batch-size {ramp.start} {ramp.increment} {ramp.samples}"
    fix = (
        "Use --rampup-batch-size START INCREMENT SAMPLES such that START + n x INCREMENT is --global-batch-size, for "
        f"example {batch.micro_batch_size} {batch.micro_batch_size} 100000"
    )
    if ramp.start < 1 or ramp.increment < 1 or ramp.samples < 0:
        yield ConfigError(
            f"{flag}: the start batch {ramp.start} and the increment {ramp.increment} must be at least 1, and the "
            f"number of samples {ramp.samples} at least 0",
            fix=fix,
        )
        return
    rise = batch.global_batch_size - ramp.start
    if rise < 0 or rise % ramp.increment:
        yield ConfigError(
            f"The batch ramp-up starts at {ramp.start} samples, above the global batch of {batch.global_batch_size} "
            f"({flag}, --global-batch-size {batch.global_batch_size})"
            if rise < 0
            else f"The batch ramp-up does not reach the global batch: {batch.global_batch_size} - {ramp.start} = "
            f"{rise} samples are not a multiple of the increment {ramp.increment} ({flag}, --global-batch-size "
            f"{batch.global_batch_size})",
            fix=fix,
        )
    if ramp.start % batch.micro_batch_size or ramp.increment % batch.micro_batch_size:
        yield ConfigError(
            f"Cannot split every batch of the ramp-up into micro-batches ({flag}, --micro-batch-size "
            f"{batch.micro_batch_size})",
            fix=f"Make start and increment multiples of {batch.micro_batch_size}, or use --micro-batch-size "
            f"{divisors(ramp.start, ramp.increment)}",
        )


def step_schedule_is_whole(config: RunConfig) -> Iterator[ConfigError]:
    """Require batches of whole micro-batches in --step-batch-size-schedule, the last of them the global batch."""
    batch = config.batch
    if not batch.step_schedule:
        return
    sizes = [size for _, size in batch.step_schedule]
    bad = [size for size in sizes if size < 1 or size % batch.micro_batch_size]
    if bad:
        yield ConfigError(
            f"Cannot split the batches {', '.join(map(str, bad))} of --step-batch-size-schedule into micro-batches of "
            f"{batch.micro_batch_size} (--micro-batch-size {batch.micro_batch_size})",
            fix=f"Make each batch of the schedule a multiple of {batch.micro_batch_size}, or lower --micro-batch-size",
        )
    if sizes[-1] != batch.global_batch_size:
        yield ConfigError(
            f"--global-batch-size {batch.global_batch_size} differs from the last batch of --step-batch-size-schedule, "
            f"{sizes[-1]}",
            fix="Remove --global-batch-size",
        )


def one_batch_schedule(config: RunConfig) -> Iterator[ConfigError]:
    """Refuse --step-batch-size-schedule beside the other ways to vary the batch."""
    batch = config.batch
    others = {"--rampup-batch-size": batch.rampup, "--decrease-batch-size-if-needed": batch.decrease_if_needed}
    names = " and ".join(name for name, value in others.items() if value)
    if batch.step_schedule and names:
        yield ConfigError(
            f"--step-batch-size-schedule cannot be combined with {names}",
            fix=f"Remove {names}, or --step-batch-size-schedule",
        )


def decreased_batch_is_not_empty(config: RunConfig) -> Iterator[ConfigError]:
    """Require that --decrease-batch-size-if-needed leaves a micro-batch for each replica."""
    batch, replicas = config.batch, config.parallel.dp
    if batch.decrease_if_needed and batch.global_batch_size < batch.micro_batch_size * replicas:
        yield ConfigError(
            f"--decrease-batch-size-if-needed would round the batch down to 0 (--global-batch-size "
            f"{batch.global_batch_size}, {replicas} replicas of --micro-batch-size {batch.micro_batch_size})",
            fix="Remove --decrease-batch-size-if-needed (some replicas then have no micro-batch), or use "
            f"--global-batch-size {batch.micro_batch_size * replicas}",
        )


RULES = (
    microbatch_divides_batch,
    microbatches_can_be_listed,
    rampup_reaches_the_batch,
    step_schedule_is_whole,
    one_batch_schedule,
    decreased_batch_is_not_empty,
)
