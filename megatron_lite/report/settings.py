"""Recorded settings as text: each value formatted as one would type it on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_lite.config.arguments import to_argv, write_fields
from megatron_lite.config.flag import Flag
from megatron_lite.config.record import read_field
from megatron_lite.config.run import RunConfig
from megatron_lite.config.table import SECTIONS, flags_by_field
from megatron_lite.errors import ConfigError
from megatron_lite.report.html import Markup, details, table
from megatron_lite.runs.comparison import Difference, flag_of

NOT_GIVEN = "not given"


def setting_name(path: str) -> str:
    """Return the flag of a field; the field's name, if several flags without arguments set it (--bf16, --fp16)."""
    declared = _flags(path)
    several = len(declared) > 1 and not any(flag.takes_value for flag in declared)
    return path.partition(".")[2] if several and not isinstance(declared[0].default, bool) else flag_of(path)


def setting_text(path: str, value: Any) -> str:
    """Return a recorded value as the arguments of its flag, or NOT_GIVEN; of a flag without arguments, on or off.

    If another flag sets the value, that flag is returned with its arguments.

    Args:
        path: of the field, as `lr.min_lr`.
        value: from metrics.jsonl, in which tuples are lists.
    """
    declared = _flags(path)
    if isinstance(value, bool):
        return "on" if value == next((flag.sets for flag in declared if not flag.takes_value), True) else "off"
    if value is None or (not value and not (declared and declared[0].default)):
        return NOT_GIVEN
    section, _, name = path.partition(".")
    try:
        args = write_fields({(section, name): read_field(SECTIONS[section], name, value)})
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError, ConfigError):  # of another version
        args = []
    if not args:  # derived from other fields
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    flag = setting_name(path)
    return shlex.join(args[args.index(flag) + 1 :] if flag in args else args)


def _flags(path: str) -> tuple[Flag, ...]:
    section, _, name = path.partition(".")
    return flags_by_field().get((section, name), ())


def change_text(change: Difference) -> str:
    """Return the difference between two starts of a run: a flag with both values, or that it was added or removed."""
    flag = setting_name(change.path)
    before, after = (_with_flag(flag, setting_text(change.path, value)) for value in (change.saved, change.current))
    if isinstance(change.current, bool):
        return f"{flag} {'added' if after else 'removed'}"
    if not before and not after:  # as None and 0
        return f"{flag}: {change.saved} → {change.current}"
    if before and after:
        return f"{before} → {after.removeprefix(f'{flag} ') if before.startswith(f'{flag} ') else after}"
    return f"{before} removed" if before else f"{after} added"


def _with_flag(flag: str, text: str) -> str:
    """Return a flag with its value as on a command line; empty: it is not given."""
    return "" if text in (NOT_GIVEN, "off") else text if text.startswith("--") else f"{flag} {text}"


def command_panel(words: Sequence[str], config: RunConfig | None) -> str:
    """Return the command line of a run, one flag in a line.

    Args:
        words: as recorded; empty: they were not.
        config: from which flags are derived otherwise; None: unknown.
    """
    note = "Command line of the last start:"
    if not words and config is not None:
        words, note = to_argv(config), "The command line was not recorded; these flags give the same configuration:"
    if not words:
        return ""
    lines: list[str] = ["python pretrain_gpt.py"]
    for word in words:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    text = " \\\n    ".join(lines)
    return f"<p class='note'>{note}</p><pre>{escape(text)}</pre>"


def all_settings(config: Mapping[str, Any]) -> str:
    """Return every recorded setting by section, shown on a click."""
    panels = "".join(
        f"<h3>{escape(section)}</h3>"
        + table(
            ("setting", "value"),
            [
                (
                    Markup(f"<code>{escape(setting_name(f'{section}.{name}'))}</code>"),
                    setting_text(f"{section}.{name}", value),
                )
                for name, value in values.items()
            ],
        )
        for section, values in config.items()
        if isinstance(values, dict)
    )
    return details("All settings", panels)
