"""Values of the DeepSpeed JSON: checks of type and range, and their merge into the fields of the run's config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from megatron_lite.config.deepspeed_entries import DEFAULTS, ENGINE, NATIVE, REFUSED, RENAMED, WITHOUT_EFFECT
from megatron_lite.config.deepspeed_kinds import SECTIONS, SWITCH, json_text, read_value
from megatron_lite.config.flag import key_of
from megatron_lite.config.given import Given
from megatron_lite.errors import ConfigError

T = TypeVar("T")
_TOP = {*ENGINE.all, *NATIVE.all}


def read_entries(found: Mapping[str, Any], given: Given, section: str = "") -> dict[str, Any]:
    """Return the entries of a section whose values are of the kinds in config/deepspeed_kinds.py.

    Entries that are "auto", and comments, whose names begin with _, are left out.

    Args:
        found: entries of the JSON.
        given: records notes, and an error for each entry that is unknown, refused or has a wrong value.
        section: name, with those of the sections around it; empty: the top level.
    """
    values: dict[str, Any] = {}
    for name, value in found.items():
        if value == "auto" or name.startswith("_"):
            continue
        try:
            present, value = _present(name, value, found, section, given)
            values |= _read_entry(present, value, section, given)
        except ConfigError as error:
            given.unreadable = True
            given.errors.append(error)
    return values


def _read_entry(name: str, value: Any, section: str, given: Given) -> dict[str, Any]:
    """Return the entry as {name: value}; {}: there is nothing to merge.

    Raises:
        ConfigError: the value is not of the entry's kind.
    """
    key = _join(section, name)
    kind = SECTIONS[section].get(name)
    if kind is not None:
        return {} if value is None and kind.nullable else {name: read_value(kind, key, value)}
    if key and key in SECTIONS:
        if value is not None and not isinstance(value, dict):
            raise _not_a_section(key, value)
        return {name: read_entries(value or {}, given, key)}
    if key in WITHOUT_EFFECT:
        given.notes.append(f"DeepSpeed JSON: {key} has no effect: {WITHOUT_EFFECT[key]}")
    elif key in REFUSED:
        if not asks_for_nothing(key, value):
            given.refuse(f"{key} in the DeepSpeed JSON is not supported", fix=REFUSED[key])
    elif not section and name in _TOP:
        return {name: value}
    else:
        _refuse_unknown(name, section, given)
    return {}


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def asks_for_nothing(key: str, value: Any) -> bool:
    """Return True if a refused entry has the value that leaves it switched off."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return value in (DEFAULTS.get(key, False), None, [])


def _present(name: str, value: Any, found: Mapping[str, Any], section: str, given: Given) -> tuple[str, Any]:
    """Return an entry with its present name.

    Raises:
        ConfigError: the section has the present name, too, or the value is not of the former entry's kind.
    """
    key = _join(section, name)
    present = RENAMED.get(key)
    if present is None:
        return name, value
    if present in found:
        raise ConfigError(
            f"{key} and {_join(section, present)} are both in the DeepSpeed JSON",
            rule="They are the former and the present name of one entry",
            fix=f"Remove {name}",
        )
    given.notes.append(f"DeepSpeed JSON: {key} is read as {present}")
    if name.startswith("cpu_offload"):
        return present, {"device": "cpu" if read_value(SWITCH, key, value) else "none"}
    return present, value


def _not_a_section(key: str, value: Any) -> ConfigError:
    """Return the error of a value where there should be a section."""
    entry, kind = next(iter(SECTIONS[key].items()))
    example = json_text({entry: {"enabled": True, "device": "cpu"}.get(entry, kind.example)})
    return ConfigError(
        f"{key} in the DeepSpeed JSON is {json_text(value)} instead of an object",
        fix=f'Write, for example, "{key.rpartition(".")[2]}": {example}',
    )


def _refuse_unknown(name: str, section: str, given: Given) -> None:
    """Refuse an entry that DeepSpeed does not have, and name the nearest one of its section."""
    keys = [*SECTIONS, *WITHOUT_EFFECT, *REFUSED, *(_join(section, own) for own in SECTIONS[section])]
    known = [key.rpartition(".")[2] for key in keys if key and key.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(name, [*known, *([] if section else _TOP)], n=1)
    given.refuse(
        f"Unknown entry {_join(section, name or json_text(name))} in the DeepSpeed JSON",
        fix=f"Did you mean {_join(section, nearest[0])}?" if nearest else "Remove the entry",
    )


def refuse_contradiction(given: Given, origin: str, entry: str, fix: str) -> None:
    """Refuse an entry that contradicts a flag."""
    given.refuse(f"The command line and the DeepSpeed JSON contradict each other: {origin} and {entry}", fix=fix)


def take_entry(given: Given, field: T, value: T, entry: str) -> None:
    """Give a field the JSON's value, unless a flag contradicts it."""
    origin = given.origin(field)
    if origin and given.value_of(key_of(field)) != value:
        fix = f"Remove {origin.split()[0]}, or give the same value in the JSON"
        refuse_contradiction(given, origin, entry, fix)
    else:
        given.give(field, value, f"{entry} in the DeepSpeed JSON")
