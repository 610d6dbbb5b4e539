"""Flag table: all Flag entries, indexed by group, option string and config field."""

from __future__ import annotations

from functools import cache

from megatron_lite.config.flags import batch, data, model, optimizer, output, parallel
from megatron_lite.config.flags.accepted import ACCEPTED
from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.flags.refused import REFUSED

SUPPORTED: dict[str, tuple[Flag, ...]] = {
    "Model": model.MODEL,
    "Vocabulary": model.VOCABULARY,
    "Batch": batch.BATCH,
    "Length and evaluation": batch.TRAINING,
    "Loss spikes": batch.SPIKES,
    "Weight checks": batch.WEIGHT_CHECKS,
    "Stopping": batch.STOPPING,
    "Learning rate": optimizer.LEARNING_RATE,
    "Optimizer": optimizer.OPTIMIZER,
    "Precision": optimizer.PRECISION,
    "Recomputation": optimizer.RECOMPUTE,
    "Parallelism": parallel.PARALLEL,
    "Pipeline": parallel.PIPELINE,
    "DeepSpeed": parallel.DEEPSPEED,
    "Data": data.DATA,
    "Tokenizer": data.TOKENIZER,
    "Checkpoints": output.CHECKPOINT,
    "Reports": output.METRICS,
    "Machine": output.RUNTIME,
}


def spelling(word: str) -> str:
    """A flag's name as the table has it: dashes for underscores, lower case, nothing from an = on."""
    return word.partition("=")[0].replace("_", "-").lower()


@cache
def all_flags() -> tuple[Flag, ...]:
    """Every row, supported ones first."""
    return tuple(flag for kind in (SUPPORTED, ACCEPTED, REFUSED) for group in kind.values() for flag in group)


@cache
def flags_by_spelling() -> dict[str, Flag]:
    """Row by spelling(name or alias)."""
    rows: dict[str, Flag] = {}
    for flag in all_flags():
        for name in (flag.name, *flag.aliases):
            assert spelling(name) not in rows, f"{name} has two rows"
            rows[spelling(name)] = flag
    return rows


@cache
def flags_by_field() -> dict[str, tuple[Flag, ...]]:
    """Supported rows by the field that they set, in the table's order."""
    rows: dict[str, tuple[Flag, ...]] = {}
    for group in SUPPORTED.values():
        for flag in group:
            rows[flag.field] = (*rows.get(flag.field, ()), flag)
    return rows
