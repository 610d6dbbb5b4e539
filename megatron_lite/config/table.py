"""Flag table: every flag, indexed by option string, config field and group."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any, get_type_hints

from megatron_lite.config.flag import Flag, Key
from megatron_lite.config.megatron_flags import UNSUPPORTED, Unsupported
from megatron_lite.config.run import CommandLine, RunConfig

SECTIONS: dict[str, type[Any]] = get_type_hints(RunConfig)
"""Sections of RunConfig, by name."""
PARTS: dict[str, type[Any]] = get_type_hints(CommandLine)
"""The same with `command`."""
GROUPS = {
    "model": "Model",
    "batch": "Batch",
    "training": "Training",
    "tuning": "Finetuning",
    "lr": "Learning rate",
    "optimizer": "Optimizer",
    "precision": "Precision",
    "fp8": "FP8",
    "recompute": "Recomputation",
    "parallel": "Parallelism",
    "command": "DeepSpeed",
    "deepspeed": "DeepSpeed",
    "data": "Data",
    "tokenizer": "Tokenizer",
    "checkpoint": "Checkpoints",
    "metrics": "Reports",
    "profile": "Profiler",
    "runtime": "Machine",
}
"""Heading of --help by section, in the order of the page."""


def spelling(arg: str) -> str:
    """Return a flag's name as in the table: dashes for underscores, lower case, without = and what follows."""
    return arg.partition("=")[0].replace("_", "-").lower()


@cache
def flags_by_field() -> dict[Key, tuple[Flag, ...]]:
    """Return the supported flags by the field that they set, fields in the order of the page."""
    found: dict[Key, tuple[Flag, ...]] = {}
    for section in GROUPS:
        hints = get_type_hints(PARTS[section])
        for entry in fields(PARTS[section]):
            default = None if entry.default is MISSING else entry.default
            found[section, entry.name] = tuple(
                replace(flag, key=(section, entry.name), type=hints[entry.name], default=default)
                for flag in entry.metadata.get("flags", ())
            )
    return found


@cache
def supported_flags() -> dict[str, tuple[Flag, ...]]:
    """Return the supported flags by heading."""
    groups: dict[str, list[Flag]] = {title: [] for title in GROUPS.values()}
    for (section, _), flags in flags_by_field().items():
        for flag in flags:
            groups[flag.group or GROUPS[section]].append(flag)
    return {title: tuple(flags) for title, flags in groups.items()}


@cache
def all_flags() -> tuple[Flag | Unsupported, ...]:
    """Return every flag, supported ones first."""
    return (*(flag for flags in supported_flags().values() for flag in flags), *UNSUPPORTED)


@cache
def flags_by_spelling() -> dict[str, Flag | Unsupported]:
    """Return every flag by its name and aliases."""
    rows: dict[str, Flag | Unsupported] = {}
    for flag in all_flags():
        for name in (flag.name, *flag.aliases):
            assert spelling(name) not in rows, f"{name} has two rows"
            rows[spelling(name)] = flag
    return rows


@cache
def field_metadata(name: str) -> dict[Key, Any]:
    """Return an entry of the metadata of every field that has it: see `flags`."""
    return {
        (section, entry.name): entry.metadata[name]
        for section, kind in PARTS.items()
        for entry in fields(kind)
        if entry.metadata.get(name)
    }


@cache
def required_fields() -> tuple[Key, ...]:
    """Return the fields without a default."""
    return tuple(
        (section, entry.name)
        for section, kind in SECTIONS.items()
        for entry in fields(kind)
        if entry.default is MISSING
    )
