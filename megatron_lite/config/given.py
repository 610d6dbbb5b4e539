"""Parsed option values with their origin, and the notes, warnings and errors collected during parsing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from megatron_lite.config.flag import Flag, Key, key_of
from megatron_lite.config.run import CommandLine
from megatron_lite.config.table import PARTS, SECTIONS, flags_by_field, required_fields
from megatron_lite.config.text_file import TextFileError, read_failure, read_fix, read_text
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_number

T = TypeVar("T")


class Given:
    """Collected values of flags and files, with all errors: one pass reports everything that is wrong.

    Attributes:
        launched: ranks that the launcher started; None: unknown.
        notes: aliases translated, prefixes expanded, flags without effect: to be printed once.
        warnings: what is allowed but probably not meant.
        missing: errors of a run, but not of an explanation (files that do not exist).
        unreadable: whether a value was dropped; rules are skipped then, since they would judge its default.
        unknown: whether a flag was unknown; it may have been meant for a field that seems to be missing.
    """

    def __init__(self, launched: int | None = None) -> None:
        self.launched = launched
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.errors: list[ConfigError] = []
        self.missing: list[ConfigError] = []
        self.unreadable = False
        self.unknown = False
        self._values: dict[Key, tuple[Any, str]] = {}
        self._run: CommandLine | None = None

    @property
    def run(self) -> CommandLine:
        """The values given so far; other fields have their default, and required ones 0."""
        if self._run is None:
            self._run = CommandLine(**{name: self._section(name) for name in PARTS})
        return self._run

    def section(self, name: str) -> Any:
        """Return a section's config."""
        return getattr(self.run, name)

    def give(self, field: T, value: T, origin: str) -> None:
        """Set a field, named by FIELD; a later call wins."""
        self.give_key(key_of(field), value, origin)

    def give_key(self, key: Key, value: Any, origin: str) -> None:
        """Set a field; a later call wins. A number outside of the flag's bounds is an error."""
        if expected := _outside(key, value):
            self.unreadable = True
            self.refuse(f"{origin} is out of range", fix=f"Give {_bounded_flag(key).name} a number {expected}")
            return
        self._values[key] = value, origin
        self._run = None

    def has(self, field: object) -> bool:
        """Return True if the command line or a file gave the field, which is named by FIELD."""
        return key_of(field) in self._values

    def origin(self, field: object) -> str:
        """Return what gave the field, as "--bf16" or "--lr 1e-3"; empty: nothing."""
        return self.origin_of(key_of(field))

    def origin_of(self, key: Key) -> str:
        """Return what gave the field with this key; empty: nothing."""
        return self._values.get(key, (None, ""))[1]

    def items(self) -> Iterator[tuple[Key, Any, str]]:
        """Yield every value that was given, with its field and origin."""
        for key, (value, origin) in self._values.items():
            yield key, value, origin

    def value_of(self, key: Key) -> Any:
        """Return the value given to a field; None: nothing gave it one."""
        return self._values.get(key, (None, ""))[0]

    def read_file(self, path: str, flag: str) -> str | None:
        """Return the content of the text file that a flag names; None, after recording an error, if unreadable."""
        try:
            return read_text(path)
        except (OSError, TextFileError) as error:
            fix = read_fix(flag, path, error, f"give another {flag}")
            errors = self.missing if isinstance(error, OSError) else self.errors
            errors.append(ConfigError(f"{flag} {read_failure(path, error)}", fix=fix))
        return None

    def refuse(self, problem: str, *, fix: str, rule: str = "") -> None:
        """Record an error."""
        self.errors.append(ConfigError(problem, fix=fix, rule=rule))

    def refuse_both(self, one: str, other: str) -> None:
        """Record that two flags contradict each other."""
        self.refuse(f"{one} and {other} contradict each other", fix="Remove one of the two")

    def _section(self, name: str) -> Any:
        values = {key[1]: 0 for key in required_fields() if key[0] == name}
        values |= {key[1]: value for key, (value, _) in self._values.items() if key[0] == name}
        return PARTS[name](**values)

    def sections(self) -> dict[str, Any]:
        """Return the sections of a RunConfig."""
        return {name: self.section(name) for name in SECTIONS}


def _bounded_flag(key: Key) -> Flag:
    return next(flag for flag in flags_by_field()[key] if flag.takes_value)


def _outside(key: Key, value: Any) -> str:
    """Return the range that a number must have, if it is outside of it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    flag = _bounded_flag(key)
    least = format_number(flag.least) if flag.above is None else format_number(flag.above)
    if flag.above is not None and value <= flag.above:
        return f"above {least}"
    if flag.below is not None and not flag.least <= value < flag.below:
        return f"from {least} to below {format_number(flag.below)}"
    if flag.most is not None and not flag.least <= value <= flag.most:
        return f"{'above' if flag.above is not None else 'from'} {least} to {format_number(flag.most)}"
    return f"of at least {least}" if value < flag.least else ""
