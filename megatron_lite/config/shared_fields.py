"""Config fields compared between ranks at start, and the table of fields that may differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_lite.config.data import DataGroup, DataSource
from megatron_lite.config.flags.table import flags_by_field
from megatron_lite.config.given import SECTIONS
from megatron_lite.config.run import RunConfig
from megatron_lite.config.values import write_value

MAY_DIFFER = {
    "runtime.device": "the device in use is compared instead: auto and cuda may mean the same",
    "runtime.num_threads": "nodes may have different numbers of cores",
    "tokenizer.vocab_file": "a node may have a copy of its own; the vocabulary is compared by its fingerprint",
    "tokenizer.merge_file": "as --vocab-file",
    "tokenizer.model": "as --vocab-file",
    "data.cache_path": "a node may keep its index cache on a disk of its own; every node builds the same index",
    "metrics.tensorboard_dir": "only the last rank writes it, and it may lie on that rank's node",
    "metrics.metrics_file": "as --tensorboard-dir",
    "metrics.progress_bar": "it concerns the terminal of the last rank only",
}
"""Fields that ranks may have different values of, each with the reason. Every other field must be equal on all ranks.

Of datasets, the paths may differ as well: one rank per node compares their contents (data/format/fingerprint.py).
"""

_SOURCES = frozenset({"data.sources", "data.train_groups", "data.valid_groups", "data.test_groups"})
_FOLDERS = frozenset({"checkpoint.save", "checkpoint.load"})


def shared_values(config: RunConfig) -> dict[str, str]:
    """Return the value of each field that all ranks must share, by "section.field", as words of the command line.

    Folders of checkpoints are absolute: the same relative path means another folder in another working directory.
    """
    return {field: field_words(field, _comparable(field, value)) for field, value in _shared_fields(config)}


def data_paths(config: RunConfig) -> tuple[str, ...]:
    """Return the paths of all data sources, in order."""
    data = config.data
    groups = (*data.train_groups, *data.valid_groups, *data.test_groups)
    return tuple(source.path for sources in (data.sources, *(g.sources for g in groups)) for source in sources)


def field_words(field: str, value: Any) -> str:
    """Return the command-line words that give a field its value: `--lr 0.001`, `--bf16`, `no --save`."""
    flags = flags_by_field().get(field, ())
    if not flags:
        return f"{field} {value}"
    for flag in flags:
        if not flag.takes_value and not flag.also and flag.sets == value:
            return flag.name
    valued = [flag for flag in flags if flag.takes_value and not flag.also]
    if not valued:
        return "no " + " or ".join(dict.fromkeys(row.name for row in flags))
    flag = valued[0]
    if value is None or value in ("", ()):
        return f"no {flag.name}"
    words = flag.write(value) if flag.write else [write_value(value)]
    return " ".join([flag.name, *words])


def _shared_fields(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for section, kind in SECTIONS.items():
        for entry in fields(kind):
            field = f"{section}.{entry.name}"
            if field not in MAY_DIFFER:
                yield field, getattr(getattr(config, section), entry.name)


def _comparable(field: str, value: Any) -> Any:
    if field in _FOLDERS and value:
        return str(Path.cwd() / value)
    if field in _SOURCES:
        return tuple(_without_path(entry) for entry in value)
    return value


def _without_path(entry: DataSource | DataGroup) -> DataSource | DataGroup:
    if isinstance(entry, DataGroup):
        return replace(entry, sources=tuple(replace(source, path="PATH") for source in entry.sources))
    return replace(entry, path="PATH")
