"""Assigns parsed flags to config fields: value types, constants, repeats, contradictions, flags without effect."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from megatron_lite.config.flags.flag import Flag
from megatron_lite.config.given import Given
from megatron_lite.config.help import metavar, plain_type
from megatron_lite.config.values import FALSE_WORDS, read_as, read_bool, shortened, write_value
from megatron_lite.config.words import Occurrence, refusal
from megatron_lite.errors import ConfigError
from megatron_lite.formatting import format_number

COUNTS = {"one": (1, 1), "three": (3, 3), "some": (1, None), "any": (0, None)}
"""Fewest and most words that may follow."""


def apply(occurrences: Sequence[Occurrence], given: Given) -> None:
    """Give each flag's value to its field; the last of repeats wins, different flags must not contradict each other."""
    refused: dict[str, list[str]] = {}
    givers: dict[str, Occurrence] = {}
    for occurrence in occurrences:
        flag = occurrence.flag
        if flag.status == "supported":
            _apply_one(occurrence, givers, given)
        elif flag.status == "no effect" or _is_harmless(occurrence):
            because = flag.help if flag.status == "no effect" else "it asks for what is done anyway"
            given.notes.append(f"{occurrence.text} has no effect: {because}")
        else:
            refused.setdefault(flag.help, []).append(occurrence.text)
    given.errors += [refusal(because, ", ".join(texts)) for because, texts in refused.items()]


def _is_harmless(occurrence: Occurrence) -> bool:
    words = occurrence.words
    return bool(words) and all(
        word.lower() in FALSE_WORDS - {"0"} or word.lower() in occurrence.flag.harmless for word in words
    )


def _apply_one(occurrence: Occurrence, givers: dict[str, Occurrence], given: Given) -> None:
    flag = occurrence.flag
    try:
        assignments = _assignments(flag, occurrence.words)
    except ValueError as error:
        given.unreadable = True
        given.errors.append(_unreadable(occurrence, str(error)))
        return
    if flag.means and assignments:
        given.notes.append(f"{occurrence.spelled} is read as {flag.means}")
    for field, value in assignments:
        earlier = givers.get(field)
        if earlier is not None and given.values[field] != value:
            if earlier.preset:
                given.notes.append(f"{earlier.text} of --preset {earlier.preset} is overridden by {occurrence.text}")
            elif earlier.flag is not flag:
                given.refuse(
                    "Two flags must not contradict each other",
                    found=f"{earlier.text} and {occurrence.text}",
                    fix="Leave one of them out",
                )
            else:
                given.notes.append(f"{earlier.text} is overridden by a later {occurrence.text}")
        givers[field] = occurrence
        given.give(field, value, occurrence.text)


def _assignments(flag: Flag, words: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The (field, value) pairs that a flag stands for.

    Raises:
        ValueError: with what the flag expects.
    """
    if not flag.takes_value:
        if len(words) > 1:
            raise ValueError("no value")
        try:
            on = read_bool(words[0]) if words else True
        except ValueError:
            raise ValueError("no value") from None
        if on:
            return [(flag.field, flag.sets), *flag.also]
        return [(flag.field, not flag.sets)] if isinstance(flag.sets, bool) else []
    fewest, most = COUNTS[flag.words]
    if len(words) < fewest or (most is not None and len(words) > most):
        raise ValueError({"one": "one value", "three": "three values"}.get(flag.words, "at least one value"))
    value = flag.read(words) if flag.read else read_as(flag.type, words[0], flag.spellings)
    if (flag.least is not None and value < flag.least) or (flag.most is not None and value > flag.most):
        raise ValueError(_bounds(flag))
    return [(flag.field, value), *flag.also]


def _bounds(flag: Flag) -> str:
    """What numbers a flag takes, for a message."""
    least, most = (None if bound is None else format_number(bound) for bound in (flag.least, flag.most))
    if least is None:
        return f"a number of at most {most}"
    return f"a number of at least {least}" if most is None else f"a number from {least} to {most}"


def _unreadable(occurrence: Occurrence, expected: str) -> ConfigError:
    name = occurrence.flag.name
    words = [shortened(word) for word in occurrence.words]
    found = " ".join([occurrence.spelled, *words]) if words else f"{occurrence.spelled} with nothing after it"
    if expected == "no value":
        return ConfigError(f"{name} takes no value", found=found, fix="Leave the value out")
    return ConfigError(f"{name} takes {expected}", found=found, fix=_form(occurrence.flag, occurrence.words))


def _form(flag: Flag, words: Sequence[str]) -> str:
    """How to write a flag's value: the choice that was probably meant, or the form with an example."""
    kind = plain_type(flag.type)
    choices = [*map(str, get_args(kind)), *flag.spellings] if get_origin(kind) is Literal and not flag.read else []
    written = {choice.lower(): choice for choice in choices}
    if words and (near := difflib.get_close_matches(words[0].lower(), written, n=1)):
        return f"Did you mean {flag.name} {written[near[0]]}?"
    example = flag.example or (choices[0] if choices else write_value(flag.default) if flag.default else "")
    return f"Write {flag.name}{metavar(flag, ' ')}" + (f", as {flag.name} {example}" if example else "")
