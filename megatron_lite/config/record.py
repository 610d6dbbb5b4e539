"""Config serialization to plain JSON values and back, for checkpoints and metrics.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_lite.errors import ConfigError

T = TypeVar("T")


def from_record(kind: type[T], record: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a record: the inverse of dataclasses.asdict, also after JSON made its tuples lists.

    A field that the record lacks, written by an older version, takes its default.

    Args:
        kind: the dataclass.
        record: its fields.
        where: the file that holds the record, and the version that wrote it, for errors.

    Raises:
        ConfigError: the record has an unknown field, or lacks one without a default.
    """
    hints = get_type_hints(kind)
    stored = f"The {kind.__name__} stored in {where}" if where else f"The stored {kind.__name__}"
    fields = {entry.name for entry in dataclasses.fields(kind) if entry.init}  # type: ignore[arg-type]
    if unknown := sorted(set(record) - fields):
        raise ConfigError(
            f"{stored} has fields that this version of megatron_lite does not have: {', '.join(unknown)}",
            fix="Read it with the version of megatron_lite that wrote it, or a newer one",
        )
    required = {
        entry.name
        for entry in dataclasses.fields(kind)  # type: ignore[arg-type]
        if entry.init and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(record)):
        raise ConfigError(
            f"{stored} lacks {', '.join(missing)}: the file was edited, or another version wrote it",
            fix="Copy the file again from an intact copy, or read it with the version of megatron_lite that wrote it",
        )
    try:
        return kind(**{name: _value(hints[name], value) for name, value in record.items()})
    except TypeError as error:
        raise ConfigError(
            f"{stored} has a value of a wrong type: {error}",
            fix="Copy the file again from an intact copy: it was edited",
        ) from error


def read_field(kind: type[Any], name: str, value: Any) -> Any:
    """Return the value of one field of a dataclass from its record; KeyError: there is no such field."""
    return _value(get_type_hints(kind)[name], value)


def _value(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if get_origin(hint) in (Union, UnionType):
        return _value(next(part for part in get_args(hint) if part is not type(None)), value)
    if dataclasses.is_dataclass(hint):
        return from_record(hint, value) if isinstance(value, Mapping) else value  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        hints = parts[:1] * len(value) if len(parts) == 2 and parts[1] is Ellipsis else parts
        return tuple(_value(part, entry) for part, entry in zip(hints, value, strict=True))
    return value
