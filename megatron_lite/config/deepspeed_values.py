"""DeepSpeed JSON parsing: sections and numbers, with errors that name the entry; config fields that entries set."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, TypeVar

from megatron_lite.config.flag import key_of
from megatron_lite.config.given import Given
from megatron_lite.config.values import MAX_NUMBER, shortened
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_number

T = TypeVar("T")

DEFAULT_SCALE_POWER = 16


def refuse_unknown(name: str, section: str, known: Iterable[str], given: Given) -> None:
    """Refuse an entry that DeepSpeed does not have, and name the nearest one."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    given.refuse(
        f"Unknown entry {section}{name} in the DeepSpeed JSON",
        fix=f"Did you mean {section}{nearest[0]}?" if nearest else "Remove the entry",
    )


def read_section(entries: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section without the entries that are "auto"; empty: there is none.

    Raises:
        ConfigError: it is not an object, or "enabled" in it is neither true nor false.
    """
    section = entries.get(key, {})
    if not isinstance(section, dict):
        example = {"zero_optimization": '"stage": 1', "optimizer": '"type": "Adam"'}.get(key, '"enabled": true')
        raise ConfigError(
            f"{key} in the DeepSpeed JSON is {section!r} instead of an object",
            fix=f'Write, for example, "{key.rpartition(".")[2]}": {{{example}}}',
        )
    if not isinstance(enabled := section.get("enabled", "auto"), bool) and enabled != "auto":
        raise not_boolean(f"{key}.enabled", enabled)
    return {name: value for name, value in section.items() if value != "auto"}


def not_boolean(key: str, value: Any) -> ConfigError:
    """Return the error of an entry that is neither true nor false."""
    return ConfigError(
        f"{key} in the DeepSpeed JSON is {shortened(json.dumps(value))} instead of true or false",
        fix=f'Write "{key.rpartition(".")[2]}": true or false, without quotes',
    )


_DEFAULTS = {
    "fp16.loss_scale": "0, a dynamic scale",
    "fp16.initial_scale_power": str(DEFAULT_SCALE_POWER),
    "fp16.loss_scale_window": "1000",
    "fp16.hysteresis": "2",
    "fp16.min_loss_scale": "1",
}
"""DeepSpeed's defaults; without one of the other entries, the flag of the command line applies."""


def _removed(key: str) -> str:
    """Return the advice to remove an entry, with what applies then."""
    default = _DEFAULTS.get(key)
    return "remove the entry for " + (f"DeepSpeed's default of {default}" if default else "the command line's value")


def read_number(value: Any, key: str) -> float:
    """Return the number of an entry.

    Raises:
        ConfigError: it is missing, not a number or too large.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER:
        return value
    entry = key.rpartition(".")[2]
    if value is None:
        raise ConfigError(
            f"{key} is missing in the DeepSpeed JSON", fix=f'Add "{entry}" there with a number, such as 1000'
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ConfigError(
            f"{key} in the DeepSpeed JSON is {shortened(repr(value))}; the limit is {format_number(MAX_NUMBER)}",
            fix=f'Write a finite number within the limit, for example "{entry}": 1, or {_removed(key)}',
        )
    plain = str(value).replace("_", "").strip()
    if isinstance(value, str) and plain.replace(".", "", 1).isdigit():
        fix = f'Write it without quotes: "{entry}": {shortened(plain)}; or {_removed(key)}'
    else:
        fix = f'Write a number, for example "{entry}": 1, or {_removed(key)}'
    raise ConfigError(f"{key} in the DeepSpeed JSON is {shortened(json.dumps(value))} instead of a number", fix=fix)


def read_whole(value: Any, key: str) -> int:
    """Return the whole number of an entry, which may be written as 1e9; errors as in read_number."""
    number = read_number(value, key)
    if number != int(number):
        raise ConfigError(
            f"{key} in the DeepSpeed JSON is {value!r} instead of a whole number",
            fix=f'Write a whole number, for example "{key.rpartition(".")[2]}": {max(1, int(number))}, or '
            + _removed(key),
        )
    return int(number)


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
