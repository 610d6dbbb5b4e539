"""--help text, generated from the flag table."""

from __future__ import annotations

import textwrap
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_lite.config.flag import Flag
from megatron_lite.config.values import write_value

INDENT = 8
INTRODUCTION = (
    "Megatron's command line. Names may have _ or -, may be shortened as long as they are unique, and take their value "
    "after a space or an =; whole numbers may be 5_000_000 or 5e6; @FILE stands for the arguments in FILE. The last of "
    "repeats wins."
)


def help_text(program: str = "pretrain_gpt.py", width: int = 100) -> str:
    """Return the help page, `width` columns wide: supported flags by group, then a pointer to the others."""
    from megatron_lite.config.megatron_flags import UNSUPPORTED
    from megatron_lite.config.table import supported_flags

    lines = [f"usage: {program} FLAG [VALUE] …", "", *textwrap.wrap(INTRODUCTION, width), ""]
    for group, flags in supported_flags().items():
        lines.append(f"{group}:")
        for flag in flags:
            lines += textwrap.wrap(
                f"{', '.join([flag.name, *flag.aliases])}{metavar(flag, ' ')}",
                width,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
            text = f"{description(flag)}{default_text(flag)}"
            lines += textwrap.wrap(text, width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
        lines.append("")
    refused = sum(flag.status == "refused" for flag in UNSUPPORTED)
    lines += textwrap.wrap(
        f"{len(UNSUPPORTED) - refused} more flags of Megatron are accepted without effect and {refused} are refused; "
        "docs/arguments.md gives the reasons. `megatron-lite explain FLAGS` explains a command before it runs.",
        width,
    )
    return "\n".join(lines)


def description(flag: Flag) -> str:
    """Return the flag's help, with the spellings that are translated to its choices."""
    if not flag.choices:
        return flag.help
    return f"{flag.help} Also accepted: {', '.join(flag.choices)}."


def metavar(flag: Flag, before: str = "") -> str:
    """Return the placeholder of the flag's value, after `before`; empty for a flag without a value."""
    if not flag.takes_value:
        return ""
    kind = plain_type(flag.type)
    if shown := flag.format.metavar if flag.format else flag.metavar:
        return before + shown
    if get_origin(kind) is Literal:
        return before + "{" + ",".join(map(str, get_args(kind))) + "}"
    return before + {int: "N", float: "X"}.get(kind, "TEXT")


def default_text(flag: Flag) -> str:
    """Return the field's default in brackets, unless it is off, 0 or empty."""
    if flag.default is None and plain_type(flag.type) is flag.type:
        return " (required)"
    if not flag.takes_value or flag.format or not flag.default:
        return ""
    return f" [{write_value(flag.default)}]"


def plain_type(annotation: Any) -> Any:
    """Return the annotation without `| None`."""
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
