"""Splitting and reading of training arguments: argument files, abbreviations, --flag=value; one value per field."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from megatron_lite.config.flag import Flag, Key, key_of
from megatron_lite.config.given import Given
from megatron_lite.config.help import metavar, plain_type
from megatron_lite.config.megatron_flags import FAMILIES, Unsupported
from megatron_lite.config.presets import PRESETS, preset_args
from megatron_lite.config.table import flags_by_spelling, spelling
from megatron_lite.config.text_file import TextFileError, read_failure, read_fix, read_text
from megatron_lite.config.values import (
    FALSE_SPELLINGS,
    is_utf8,
    read_as,
    read_bool,
    shortened,
    shown_bytes,
    write_value,
)
from megatron_lite.errors import ConfigError

SHOWN_MATCHES = 5
MAX_NESTING = 10
"""Argument files within argument files; more is a circle."""
COUNTS = {"one": "one value", "three": "three values", "some": "at least one value", "any": ""}


@dataclass(frozen=True)
class Occurrence:
    """One flag of a command line.

    Attributes:
        flag: the flag's entry in the table.
        spelled: the flag as written, for messages.
        args: the arguments after it.
        preset: the preset that stands for it; empty: it was written.
    """

    flag: Flag | Unsupported
    spelled: str
    args: tuple[str, ...]
    preset: str = ""

    @property
    def text(self) -> str:
        """The flag as written, with its arguments."""
        return " ".join([self.spelled, *self.args])

    @property
    def origin(self) -> str:
        """The same, and the preset that stands for it."""
        return f"{self.text} of --preset {self.preset}" if self.preset else self.text


def read_command_line(argv: Sequence[str], given: Given) -> None:
    """Read a command line into `given`, which also collects all that is wrong with it.

    Raises:
        ConfigError: an argument is not UTF-8.
    """
    assign(split_flags(argv, given), given)


def split_flags(argv: Sequence[str], given: Given) -> list[Occurrence]:
    """Split a command line into flags, in order; unknown and ambiguous ones become errors in `given`.

    Raises:
        ConfigError: an argument is not UTF-8.
    """
    require_utf8(argv)
    occurrences: list[Occurrence] = []
    for spelled, args in _group(_expand(argv, given), given):
        flag = _find(spelled, args, given)
        if flag is None:
            continue
        occurrences.append(Occurrence(flag, spelled, args))
        if flag.name == "--preset" and len(args) == 1:
            # In front, so that flags that are written override the preset wherever it is.
            occurrences[:0] = _of_preset(spelled, args[0].lower(), given)
    return occurrences


def assign(occurrences: Sequence[Occurrence], given: Given) -> None:
    """Assign each flag's value to its field; the last of repeats wins, different flags must not contradict."""
    refused: dict[tuple[str, str], list[str]] = {}
    givers: dict[Key, Occurrence] = {}
    for occurrence in occurrences:
        flag = occurrence.flag
        if isinstance(flag, Flag):
            _assign_one(flag, occurrence, givers, given)
        elif flag.status == "no effect":
            given.notes.append(f"{occurrence.text} has no effect: {flag.reason}")
        elif _is_harmless(flag, occurrence.args):
            given.notes.append(f"{occurrence.text} has no effect: it is the behaviour without the flag")
        else:
            refused.setdefault((flag.reason, flag.fix), []).append(occurrence.text)
    given.errors += [refusal(texts, reason, fix) for (reason, fix), texts in refused.items()]


def refusal(texts: Sequence[str], reason: str, fix: str) -> ConfigError:
    """Return the error for flags that are refused for the same reason."""
    return ConfigError(f"{', '.join(texts)} {'are' if len(texts) > 1 else 'is'} not supported", rule=reason, fix=fix)


def split_fault(text: str, error: ValueError) -> tuple[str, str]:
    """Return why shlex could not split a text, and what to do about it."""
    if "quotation" not in str(error):
        return "it ends with a backslash", "Remove the backslash at its end"
    # The lines before the unclosed one can be split without those after it.
    lines = text.splitlines()
    for first in range(len(lines), 0, -1):
        try:
            shlex.split("\n".join(lines[: first - 1]), comments=True)
        except ValueError:
            continue
        line = lines[first - 1].strip()
        return (
            f"a quotation mark is not closed in line {first}, {shortened(line)}",
            "Close the quotation mark in that line",
        )
    return "a quotation mark is not closed", "Close the quotation mark"


def require_utf8(args: Iterable[str]) -> None:
    """Refuse arguments that no output could show and no tokenizer encode.

    Raises:
        ConfigError: one is not UTF-8.
    """
    for arg in args:
        if not is_utf8(arg):
            raise ConfigError(
                f"The argument {shown_bytes(arg)} is not valid UTF-8",
                fix="Retype the argument in a terminal or script in UTF-8; rename a file whose name is not UTF-8",
            )


def read_argument_file(arg: str) -> str:
    """Return the content of an argument file @FILE.

    Raises:
        ConfigError: it cannot be read.
    """
    path = arg[1:]
    try:
        return read_text(path)
    except (OSError, TextFileError) as error:
        fix = read_fix("@", path, error, "write the flags on the command line")
        fix = fix.replace("Give @ a", "Give @FILE a").replace("@ ", "@")
        raise ConfigError(f"Argument file {read_failure(arg, error)}", fix=fix) from error


def _is_harmless(flag: Unsupported, args: tuple[str, ...]) -> bool:
    return bool(args) and all(arg.lower() in FALSE_SPELLINGS - {"0"} or arg.lower() in flag.harmless for arg in args)


def _assign_one(flag: Flag, occurrence: Occurrence, givers: dict[Key, Occurrence], given: Given) -> None:
    try:
        assignments = _assignments(flag, occurrence.args)
    except ValueError as error:
        given.unreadable = True
        given.errors.append(_unreadable(flag, occurrence, str(error)))
        return
    if flag.means and assignments:
        given.notes.append(f"{occurrence.spelled} is read as {flag.means}")
    for key, value in assignments:
        earlier = givers.get(key)
        if earlier is not None and given.value_of(key) != value:
            if earlier.preset:
                given.notes.append(f"{earlier.text} of --preset {earlier.preset} is overridden by {occurrence.text}")
            elif earlier.flag is not flag:
                given.refuse_both(earlier.text, occurrence.text)
            else:
                given.notes.append(f"{earlier.text} is overridden by a later {occurrence.text}")
        givers[key] = occurrence
        given.give_key(key, value, occurrence.origin)


def _assignments(flag: Flag, args: tuple[str, ...]) -> list[tuple[Key, Any]]:
    """Return the (field, value) pairs that a flag stands for.

    Raises:
        ValueError: with what the flag expects.
    """
    also = [(key_of(field), value) for field, value in flag.also]
    if not flag.takes_value:
        if len(args) > 1:
            raise ValueError("no value")
        try:
            on = read_bool(args[0]) if args else True
        except ValueError:
            raise ValueError("no value") from None
        if on:
            return [(flag.key, flag.sets), *also]
        return [(flag.key, not flag.sets)] if isinstance(flag.sets, bool) else []
    count = flag.format.count if flag.format else "one"
    if (count == "one" and len(args) != 1) or (count == "three" and len(args) != 3) or (count == "some" and not args):
        raise ValueError(COUNTS[count])
    value = flag.format.read(args) if flag.format else read_as(flag.type, args[0], flag.choices)
    return [(flag.key, value), *also]


def _unreadable(flag: Flag, occurrence: Occurrence, expected: str) -> ConfigError:
    args = [shortened(arg) for arg in occurrence.args]
    text = " ".join([occurrence.spelled, *args]) if args else f"{occurrence.spelled} with nothing after it"
    if occurrence.args == ("",):
        text = f"the empty value of {occurrence.spelled} (is a variable unset?)"
    if expected == "no value":
        return ConfigError(
            f"{flag.name} takes no value, but is given as {text}", fix=f"Write {occurrence.spelled} alone"
        )
    return ConfigError(f"Cannot read {text}: expected {expected}", fix=_form(flag, occurrence.args))


def _form(flag: Flag, args: Sequence[str]) -> str:
    """Return how to write a flag's value: the choice that was probably meant, or the form with an example."""
    kind = plain_type(flag.type)
    choices = [*map(str, get_args(kind)), *flag.choices] if get_origin(kind) is Literal and not flag.format else []
    written = {choice.lower(): choice for choice in choices}
    if args and (near := difflib.get_close_matches(args[0].lower(), written, n=1)):
        return f"Did you mean {flag.name} {written[near[0]]}?"
    if flag.format:
        example = flag.format.example
    else:
        # The size 1, a default of many flags, turns their feature off.
        default = 2 if kind is int and flag.default == 1 else flag.default
        example = choices[0] if choices else write_value(default) if default else ""
    return f"Write {flag.name}{metavar(flag, ' ')}" + (f", for example {flag.name} {example}" if example else "")


def _of_preset(spelled: str, name: str, given: Given) -> list[Occurrence]:
    """Return the flags that a preset stands for."""
    expanded = preset_args(name)
    if expanded is None:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        given.refuse(
            f"Unknown preset: {spelled} {name}",
            fix=(f"Did you mean --preset {nearest[0]}? " if nearest else "") + f"Presets: {', '.join(PRESETS)}",
        )
        given.unknown = True
        return []
    given.notes.append(f"--preset {name} stands for {' '.join(expanded)}")
    rows = flags_by_spelling()
    return [Occurrence(rows[spelling(flag)], flag, values, name) for flag, values in _group(expanded, given)]


def _expand(argv: Sequence[str], given: Given, nesting: int = 0) -> Iterator[str]:
    """Yield the arguments, those of argument files (@FILE) in place. A file may have quotes and # comments."""
    for arg in argv:
        if not arg.startswith("@") or len(arg) == 1:
            yield arg
            continue
        try:
            text = read_argument_file(arg)
            args = shlex.split(text, comments=True)
        except ConfigError as error:
            given.errors.append(error)
            continue
        except ValueError as error:  # of shlex
            fault, fix = split_fault(text, error)
            given.refuse(f"Cannot split argument file {arg} into arguments: {fault}", fix=fix)
            continue
        if nesting == MAX_NESTING:
            given.refuse(
                f"Argument files include each other without end ({arg}, {nesting} files deep)",
                fix=f"Remove from {arg[1:]} the argument @FILE whose file is being read already",
            )
            return
        yield from _expand(args, given, nesting + 1)


def _group(argv: Iterable[str], given: Given) -> list[tuple[str, tuple[str, ...]]]:
    """Return the flags as spelled, each with the arguments up to the next."""
    groups: list[tuple[str, list[str]]] = []
    for arg in argv:
        if arg.startswith("--") and len(arg) > 2:
            name, equals, value = arg.partition("=")
            if name == "--":
                given.refuse(f"{arg!r} has no flag before the =", fix=f"Write the flag: --FLAG={value}")
                continue
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(arg)
        else:
            given.refuse(
                f"The command line starts with {arg!r}, which is no flag and follows none",
                fix=f"Remove {arg!r}, or write before it the flag whose value it is",
            )
    return [(name, tuple(args)) for name, args in groups]


def _find(spelled: str, args: tuple[str, ...], given: Given) -> Flag | Unsupported | None:
    """Return the flag with this name, alias or unique prefix; None, after recording an error, if there is none."""
    name, rows = spelling(spelled), flags_by_spelling()
    if name in rows:
        flag = rows[name]
        if name != spelling(flag.name):
            given.notes.append(f"{spelled} is read as {flag.name}")
        return flag
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix):
            given.errors.append(refusal([" ".join([spelled, *args])], family.reason, family.fix))
            return None
    matches = {row.name: row for full, row in rows.items() if full.startswith(name)}
    if len(matches) == 1:
        ((full, flag),) = matches.items()
        given.notes.append(f"{spelled} is read as {full}, the only flag that starts so")
        return flag
    given.unknown = True
    if matches:
        listed = sorted(matches)
        more = f" and {len(listed) - SHOWN_MATCHES} more" if len(listed) > SHOWN_MATCHES else ""
        given.refuse(
            f"{spelled} is an abbreviation of several flags: {', '.join(listed[:SHOWN_MATCHES])}{more}",
            fix="Write the flag in full",
        )
        return None
    nearest = difflib.get_close_matches(name, rows, n=1, cutoff=0.75)
    fix = "Remove it, or look its name up in --help or docs/arguments.md"
    if nearest:
        row = rows[nearest[0]]
        fix = f"Did you mean {row.name}?"
        if isinstance(row, Unsupported):
            fix = f"If {row.name} is meant: {refusal([row.name], row.reason, row.fix) if row.fix else row.reason}"
    given.refuse(f"Unknown flag {spelled}", fix=fix)
    return None
