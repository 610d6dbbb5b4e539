"""Config fields that must be equal on all ranks: every field that is not marked `may_differ`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_lite.config.arguments import write_field
from megatron_lite.config.data import DataGroup, DataSource
from megatron_lite.config.flag import FIELD, Key, key_of
from megatron_lite.config.run import RunConfig
from megatron_lite.config.table import SECTIONS, field_metadata, flags_by_field

_SOURCES = {
    key_of(field)
    for field in (FIELD.data.sources, FIELD.data.train_groups, FIELD.data.valid_groups, FIELD.data.test_groups)
}
_FOLDERS = {key_of(FIELD.checkpoint.save), key_of(FIELD.checkpoint.load)}


def shared_values(config: RunConfig) -> dict[str, str]:
    """Return the value of each field that all ranks must share, by "section.field", as arguments of a command line.

    Of datasets, the paths may differ: one rank per node compares their contents (data/format/fingerprint.py). Folders
    of checkpoints are absolute: the same relative path means another folder in another working directory.
    """
    may_differ = field_metadata("may_differ")
    return {
        f"{section}.{entry.name}": _field_text((section, entry.name), getattr(getattr(config, section), entry.name))
        for section, kind in SECTIONS.items()
        for entry in fields(kind)
        if (section, entry.name) not in may_differ
    }


def data_paths(config: RunConfig) -> tuple[str, ...]:
    """Return the paths of all data sources, in order."""
    data = config.data
    groups = (*data.train_groups, *data.valid_groups, *data.test_groups)
    return tuple(source.path for sources in (data.sources, *(g.sources for g in groups)) for source in sources)


def _field_text(key: Key, value: Any) -> str:
    """Return the arguments that give a field its value: `--lr 0.001`, `--bf16`, `no --save`."""
    if key in _FOLDERS and value:
        value = str(Path.cwd() / value)
    if key in _SOURCES:
        value = tuple(_without_path(entry) for entry in value)
    declared = flags_by_field()[key]
    if not declared:
        return f"{'.'.join(key)} {value}"
    valued = [flag.name for flag in declared if flag.takes_value and not flag.also]
    if value is None or value in ("", ()) or (not valued and all(flag.sets != value for flag in declared)):
        return "no " + (valued[0] if valued else " or ".join(flag.name for flag in declared))
    return " ".join(write_field(declared, value))


def _without_path(entry: DataSource | DataGroup) -> DataSource | DataGroup:
    if isinstance(entry, DataGroup):
        return replace(entry, sources=tuple(replace(source, path="PATH") for source in entry.sources))
    return replace(entry, path="PATH")
