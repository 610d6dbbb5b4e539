"""Flags that make a run fit into memory: small changes of the training command, tried one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.arguments import parse_run, to_argv
from megatron_lite.config.run import RunConfig
from megatron_lite.config.vocabulary import with_vocabulary
from megatron_lite.errors import ConfigError
from megatron_lite.planner.memory import fullest_bytes

MOST = 3
"""Remedies that are listed."""


def remedies(config: RunConfig, available: int, per_node: int) -> list[tuple[str, int]]:
    """Return flags with which the run fits, and its bytes on the fullest rank then, the least change first.

    Args:
        config: with the vocabulary filled in.
        available: bytes of memory for tensors.
        per_node: devices of a node, on which tensor parallelism should stay.
    """
    found = list[tuple[str, int]]()
    for flags in _changes(config, per_node):
        if any(set(fewer.split()) < set(flags) for fewer, _ in found):
            continue
        try:
            changed = parse_run([*to_argv(config), *flags], world_size=config.parallel.world_size).config
            size = fullest_bytes(with_vocabulary(changed, config.model.vocab_size))
        except ConfigError:
            continue  # the layout does not divide the model or the ranks
        if size <= available:
            found.append((" ".join(flags), size))
            if len(found) == MOST:
                break
    return found


def _changes(config: RunConfig, per_node: int) -> Iterator[list[str]]:
    """Yield flags to add: first those that cost no time, one by one, then all of them, then larger layouts."""
    parallel, micro = config.parallel, config.batch.micro_batch_size
    sharded = ["--use-distributed-optimizer"] if parallel.dp > 1 and not parallel.distributed_optimizer else []
    split = ["--sequence-parallel"] if parallel.tp > 1 and not parallel.sequence_parallel else []
    smaller = ["--micro-batch-size", "1"] if micro > 1 else []
    again = (
        ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        if config.recompute.granularity != "full"
        else []
    )
    singles = [flags for flags in (sharded, split, smaller, again) if flags]
    yield from singles
    if len(singles) > 1:
        free = [*sharded, *split]
        if sharded and split:
            yield free
        if free and again:
            yield [*free, *again]
        yield [*free, *smaller, *again]
    everything = [*sharded, "--sequence-parallel", *smaller, *again]
    for factor in (2, 4, 8):
        tp, pp = parallel.tp * factor, parallel.pp * factor
        if tp <= per_node:
            yield [*everything, "--tensor-model-parallel-size", str(tp)]
        rest = everything if parallel.tp > 1 else [*sharded, *smaller, *again]
        yield [*rest, "--pipeline-model-parallel-size", str(pp)]
